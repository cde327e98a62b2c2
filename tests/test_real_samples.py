"""The ten real rows of ../shared/real_samples, where they exist: the model learns them by heart, images decide."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real(shared):
    folder = shared / "real_samples"
    if not (folder / "test_samples.txt").is_file():
        pytest.skip(f"no real samples in {folder}")
    return folder


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_ten_captions_are_learned_by_heart_and_belong_to_their_images(root, real, tmp_path):
    samples, captions = real / "test_samples.txt", real / "captions.tsv"
    command = [sys.executable, str(root / "tools" / "overfit_real_samples.py"), str(samples), str(captions)]
    done = subprocess.run(command + [str(tmp_path / "out")], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    ids = [line.split("\t")[0] for line in lines(samples)]
    truth = {line.split("\t")[0]: line.split("\t")[1] for line in lines(captions)}
    assert len(ids) == 10

    def predicted(name):
        rows = [line.split("\t") for line in lines(tmp_path / "out" / f"{name}.txt")]
        assert [row[0] for row in rows] == ids
        return [row[1] for row in rows]

    same, other = predicted("same_images"), predicted("other_images")
    assert sum(caption == truth[key] for key, caption in zip(ids, same)) >= 9
    assert sum(caption == truth[key] for key, caption in zip(ids, other)) <= 1
    # What the wrong images bring is the caption of the image that was shown.
    assert sum(caption == truth[key] for key, caption in zip(ids[1:] + ids[:1], other)) >= 9
