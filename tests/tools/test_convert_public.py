"""convert_public.py on small files in the form of MUGE's ECommerce-IC and of AI Challenger's captions."""

import base64
import json
import os
import resource
import subprocess
import sys

import pytest

from paddlemix.datasets.caption_files import read_references
from paddlemix.datasets.rows import image_text, read_rows
from tests.helpers import image_base64, image_bytes, without_coverage


@pytest.fixture
def call(root):
    def call(*arguments):
        command = [sys.executable, "tools/convert_public.py", *map(str, arguments), "--quiet"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture
def muge(tmp_path):
    """Three images, url-safe as MUGE's own code decodes them; the captions in another order, one image without any."""
    images = [base64.urlsafe_b64encode(image_bytes(n)).decode() for n in range(3)]
    (tmp_path / "IC_valid.tsv").write_text("".join(f"10{n}\t{image}\n" for n, image in enumerate(images)) + "bad\tx\n")
    lines = [{"image_id": "101", "text": ["纯棉 短裤", "夏季\t新款", " "]}, {"image_id": "100", "text": ["红杯"]}]
    (tmp_path / "IC_valid.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return tmp_path / "IC_valid.tsv", tmp_path / "IC_valid.jsonl"


@pytest.fixture
def challenger(tmp_path):
    """Two images; a record names a file that is missing, one leads out of the folder, one is not an image."""
    folder = tmp_path / "caption_train_images_20170902"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes(image_bytes(number))
    (folder / "text.jpg").write_bytes(b"no image")
    (tmp_path / "secret.jpg").write_bytes(image_bytes(5))
    names = ["0.jpg", "gone.jpg", "../secret.jpg", "1.jpg", "text.jpg", "/etc/passwd"]
    records = [{"url": "http://x", "image_id": name, "caption": [f"{name}一", f"{name}二"]} for name in names]
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    return folder, tmp_path / "annotations.json"


def rows_of(path):
    return [(row.id, row.caption, base64.b64decode(bytes(image_text(row)))) for row in read_rows(str(path), True)]


@pytest.mark.parametrize("out", ["out.tsv", "out.json"])
def test_muge(call, muge, tmp_path, out):
    status, said, errors = call(*muge, tmp_path / out)
    assert (status, said) == (0, "2 images, 3 rows\n")
    texts = {"100": ["红杯"], "101": ["纯棉 短裤", "夏季 新款"]}
    wanted = [(name, text, image_bytes(int(name) - 100)) for name, found in texts.items() for text in found]
    assert rows_of(tmp_path / out) == wanted
    assert read_references(str(tmp_path / "out.references.tsv")).texts == texts
    assert (tmp_path / "out.rejected.tsv").read_text() == "3\t102\tno captions\n4\tbad\tno captions\n"
    assert call(*muge, tmp_path / out, "--one_row")[1] == "2 images, 2 rows\n"
    assert rows_of(tmp_path / out) == wanted[:2]


@pytest.mark.parametrize("form", ["inline", "reference"])
def test_ai_challenger(call, challenger, tmp_path, form):
    status, said, _ = call(*challenger, tmp_path / "out.json", "--images", form)
    assert (status, said) == (0, "2 images, 4 rows\n")
    assert rows_of(tmp_path / "out.json") == [
        (f"{n}.jpg", f"{n}.jpg{mark}", image_bytes(n)) for n in range(2) for mark in "一二"
    ]
    (first, *_) = json.loads((tmp_path / "out.json").read_text())
    file = {"file": "caption_train_images_20170902/0.jpg"}
    assert first["image"] == (file if form == "reference" else image_base64(0))
    rejected = [line.split("\t")[1:] for line in (tmp_path / "out.rejected.tsv").read_text().splitlines()]
    outside = "image path leads out of the folder"
    wanted = {"gone.jpg": "no such file", "../secret.jpg": outside, "text.jpg": "not an image", "/etc/passwd": outside}
    assert rejected == [list(pair) for pair in wanted.items()]


def test_captions_without_their_image_are_counted_and_listed(call, muge, tmp_path):
    with open(muge[1], "a") as file:
        file.write('{"image_id": "900", "text": ["没有图"]}\n{"image_id": "901", "text": ["也没有", "图"]}\n')
    status, said, errors = call(*muge, tmp_path / "out.tsv")
    assert (status, said) == (0, "2 images, 3 rows\n") and "rejected          2  image is not in IMAGES\n" in errors
    listed = (tmp_path / "out.rejected.tsv").read_text().splitlines()
    assert listed[2:] == ["3\t900\timage is not in IMAGES", "4\t901\timage is not in IMAGES"]


def test_files_in_gbk_get_the_command_that_converts_them(call, muge, tmp_path):
    text = '{"image_id": "100", "text": ["红色的杯子"]}\n{"image_id": "101", "text": ["蓝色的雨伞"]}\n'
    for content in (text, "[" + text.replace("\n", ",")[:-1] + "]"):
        (tmp_path / "gbk.jsonl").write_text(content, "gb18030")
        status, _, errors = call(muge[0], tmp_path / "gbk.jsonl", tmp_path / "out.tsv")
        file = tmp_path / "gbk.jsonl"
        assert status == 2 and f"iconv -f GB18030 -t UTF-8 {file} > {tmp_path / 'gbk.utf8.jsonl'}\n" in errors
    rows = muge[0].read_text().replace("10", "编号") + "编号\tx\n"
    (tmp_path / "gbk.tsv").write_text(rows, "gb18030")
    status, _, errors = call(tmp_path / "gbk.tsv", muge[1], tmp_path / "out.tsv")
    assert status == 2 and "gbk.tsv is GBK text" in errors


def test_wrong_arguments_are_refused_and_leave_nothing(call, muge, challenger, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for images, captions in (muge[::-1], challenger[::-1]):
        status, _, errors = call(images, captions, tmp_path / "out.tsv")
        assert status == 2 and "give IMAGES CAPTIONS OUT" in errors
    status, _, errors = call(*muge, tmp_path / "out.tsv", "--images", "reference")
    assert status == 2 and "needs an OUT.json" in errors
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "captions, says",
    [
        ("[{}]", "record 1 is not"), ('{"image_id": "100", "text": 3}', "record 1 is not"),
        ('{"image_id": "100", "text": [3]}', "record 1 is not"), ("[" * 5000, "record 1 is not"),
        ('{"image_id": "x", "text": ["一"]}', "no image of"), ("", "no image of"), ("a" * 100, "no image of|record 1"),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_nothing(call, muge, tmp_path, captions, says):
    muge[1].write_text(captions)
    status, _, errors = call(*muge, tmp_path / "out" / "out.tsv")
    assert status in (1, 2) and errors.startswith("error: ") and errors.count("\n") == 1
    assert not os.path.exists(tmp_path / "out") or os.listdir(tmp_path / "out") == []


def test_captions_hold_no_tabs_and_no_halves_of_characters(call, muge, challenger, tmp_path):
    muge[1].write_text(json.dumps({"image_id": "100", "text": ["a\tb\n c", "\ud800杯"]}))
    status, _, errors = call(*muge, tmp_path / "out.tsv")
    assert status == 0, errors
    assert [row.caption for row in read_rows(str(tmp_path / "out.tsv"), True)] == ["a b c", "?杯"]
    challenger[1].write_text(json.dumps([{"image_id": "\ud800\0.jpg", "caption": ["杯"]}]))
    status, _, errors = call(*challenger, tmp_path / "other.tsv")
    assert status == 1 and "no such file" in errors


def test_several_references_reach_the_scores(call, muge, tmp_path, root):
    """The table of evaluate_captions.py against pycocoevalcap's own multi-reference scores."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    call(*muge, tmp_path / "out.tsv", "--one_row")
    results = {"100": "红色的杯", "101": "夏季纯棉"}
    (tmp_path / "results.txt").write_text("".join(f"{key}\t{text}\n" for key, text in results.items()))
    command = [sys.executable, "tools/evaluate_captions.py", tmp_path / "results.txt", tmp_path / "out.references.tsv"]
    command += ["--json", tmp_path / "scores.json", "--quiet", "--resamples", "0", "--workers", "0"]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    found = json.loads((tmp_path / "scores.json").read_text())["results"]["measures"]
    references = {"100": ["红 杯"], "101": ["纯 棉 短 裤", "夏 季 新 款"]}
    ours = {key: [" ".join(text)] for key, text in results.items()}
    assert found["CIDEr-D"]["value"] == pytest.approx(Cider(4).compute_score(references, ours)[0])
    assert found["ROUGE-L"]["value"] == pytest.approx(Rouge().compute_score(references, ours)[0])
    assert found["BLEU-2"]["value"] == pytest.approx(Bleu(4).compute_score(references, ours, verbose=0)[0][1])


def test_what_a_disk_refuses_names_the_file(call, muge, tmp_path, monkeypatch):
    for name in set(os.environ) - set(without_coverage()):
        monkeypatch.delenv(name)
    muge[1].write_text(json.dumps({"image_id": "100", "text": ["杯" * 100_000]}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        status, _, errors = call(*muge, tmp_path / "out.tsv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1 and errors == f"error: cannot write {tmp_path / 'out.tsv'}: File too large\n"
