"""tools/score_rows.py: losses with and without the image, row by row."""

import json
import re

import paddle
import pytest
from PIL import Image

from paddlemix.datasets.collator import MGenVLCollator
from paddlemix.datasets.labels import Options, convert
from paddlemix.datasets.score_files import read_scores
from paddlemix.inference import scoring
from paddlemix.inference.loading import load_model
from paddlemix.inference.row_shards import Shard, merge_shards
from paddlemix.processors.images import open_image
from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT, encode_example
from paddlemix.utils import cli
from paddlemix.utils.errors import UserError
from tests.helpers import image_base64, image_bytes, save_tiny_model
from tools import score_rows

CAPTIONS = ["一只红色的杯子，仅售9元！", "cup", "蓝色背景的广告图", "a very long caption, " * 6, "灯"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=3)


@pytest.fixture
def call(model, tmp_path, monkeypatch, capfd):
    """call(data, *flags) → (status, lines of the output as lists, stderr). data: bytes of a TSV, or a file's name."""

    def run(data, *flags, output="scores.tsv"):
        source = tmp_path / "in.tsv"
        if isinstance(data, bytes):
            source.write_bytes(data)
        else:
            source = data
        argv = ["score_rows.py", model, str(source), str(tmp_path / output), *flags]
        monkeypatch.setattr("sys.argv", argv)
        status = cli.run(score_rows.main)
        made = tmp_path / output
        lines = [line.split("\t") for line in made.read_text("utf-8").splitlines()] if made.exists() else None
        return status, lines, capfd.readouterr().err

    return run


def table(captions=CAPTIONS):
    return "".join(f"r{i}\t{image_base64(i)}\t{caption}\n" for i, caption in enumerate(captions)).encode()


def naive(loaded, prompt, caption, pixels):
    """The model's own loss of one sample, as training computes it."""
    encoded = encode_example(
        loaded.tokenizer, [(prompt, caption)], 1, template=loaded.template, label_all_turn_markers=False
    )
    batch = MGenVLCollator(loaded.tokenizer.pad_token_id)([dict(encoded, images=pixels[None])])
    inputs = {name: paddle.to_tensor(batch[name]) for name in ("input_ids", "labels", "images", "attention_mask")}
    with paddle.no_grad():
        return float(loaded.model(**inputs).loss)


def test_a_batch_gives_what_the_naive_formula_gives(call, model):
    status, lines, _ = call(table())
    assert status == 0 and [line[0] for line in lines] == ["r0", "r1", "r2", "r3", "r4"]
    single = call(table(), "--batch_size", "1", output="alone.tsv")[1]
    loaded = load_model(model)
    grey = loaded.image_processor(Image.new("RGB", (9, 9), (128, 128, 128)))
    for i, caption in enumerate(CAPTIONS):
        pixels = loaded.image_processor(open_image(image_bytes(i)))
        loss, blank = (naive(loaded, DEFAULT_PROMPT, caption, image) for image in (pixels, grey))
        assert loss != pytest.approx(blank, abs=1e-3)
        for line in (lines[i], single[i]):
            assert list(map(float, line[1:4])) == pytest.approx([loss, blank, blank - loss], abs=2e-5)


def test_records_are_asked_what_they_ask(call, model, tmp_path):
    (tmp_path / "in.tsv").write_bytes(table())
    options = Options(prompt="这是什么？", val_every=0, images="reference")
    convert(str(tmp_path / "in.tsv"), str(tmp_path / "set"), options, disable_progress=True)
    records = call(tmp_path / "set" / "train.json", output="records.tsv")[1]
    asked = call(table(), "--prompt", "这是什么？", output="asked.tsv")[1]
    assert [line[1:] for line in records] == [line[1:] for line in asked]
    assert asked[0][1] != call(table(), output="plain.tsv")[1][0][1]
    # Rows with prompts of their own share a batch.
    lines = (tmp_path / "set" / "train.json").read_text("utf-8").splitlines()
    mixed = [line.replace("这是什么？", "写一句广告语") if number % 2 else line for number, line in enumerate(lines)]
    (tmp_path / "set" / "mixed.json").write_text("\n".join(mixed), "utf-8")
    found = call(tmp_path / "set" / "mixed.json", output="mixed.tsv")[1]
    loaded = load_model(model)
    for i, line in enumerate(found):
        seen = loaded.image_processor(open_image(image_bytes(i))), loaded.image_processor.blank()
        for column, pixels in enumerate(seen, 1):
            single = naive(loaded, ["写一句广告语", "这是什么？"][i % 2], CAPTIONS[i], pixels)
            assert float(line[column]) == pytest.approx(single, abs=2e-5)


def test_bad_rows_keep_their_lines(call, tmp_path):
    good = table(CAPTIONS[:2])
    content = good + b"x\t!!!not base64!!!\tcup\nno caption\t" + image_base64(1).encode() + b"\n" + good
    status, lines, err = call(content)
    assert status == 0 and len(lines) == 6 and lines[:2] == lines[4:]
    assert [line[1:4] for line in lines[2:4]] == [["", "", ""]] * 2
    assert lines[2][4] == "bad base64" and lines[3][4] == "no caption"
    assert "line 3, id 'x': bad base64" in err and "2 rows have no score" in err
    scores = list(read_scores(str(tmp_path / "scores.tsv")))
    assert [score is None for _, score in scores] == [False, False, True, True, False, False]
    assert scores[0][1].gain == float(lines[0][3])
    assert call(b"x\tnot base64\tcup\n", output="none.tsv")[0] == 1
    with pytest.raises(UserError, match="score_rows"):
        list(read_scores(str(tmp_path / "in.tsv")))


def test_costly_tokens_are_characters_in_order(call):
    tokens = json.loads(call(table(["杯子"]))[1][0][4])
    losses = [loss for _, loss in tokens]
    assert losses == sorted(losses, reverse=True)
    # The byte vocabulary spells each character with three tokens.
    assert {text for text, _ in tokens} == {"杯", "子", "<|im_end|>", "\n"}


def test_killed_it_goes_on_and_shards_make_the_same(call, model, tmp_path, monkeypatch):
    content = table(CAPTIONS * 4)
    expected = call(content, "--batch_size", "2")[1]
    line, told = scoring.Scorer.line, []

    def dies(self, name, score):
        told.append(name)
        if len(told) == 7:
            raise MemoryError
        return line(self, name, score)

    monkeypatch.setattr(scoring.Scorer, "line", dies)
    with pytest.raises(MemoryError):
        scoring.score_file(model, str(tmp_path / "in.tsv"), str(tmp_path / "again.tsv"), batch_size=2)
    assert (tmp_path / "again.tsv.partial").exists()
    status, lines, err = call(content, "--batch_size", "2", output="again.tsv")
    assert status == 0 and lines == expected and "resuming after the 6 rows" in err
    assert len(told) == 7 + 14
    for index in (1, 2, 3):
        source, whole = str(tmp_path / "in.tsv"), str(tmp_path / "joined.tsv")
        scoring.score_file(model, source, whole, batch_size=3, shard=Shard(index, 3))
    merge_shards(whole, source)
    names = [name for name, _ in read_scores(whole)]
    assert names == [line[0] for line in expected]
    for (_, score), line in zip(read_scores(whole), expected):
        assert list(score) == pytest.approx(list(map(float, line[1:4])), abs=2e-5)


def test_out_of_memory_halves_the_batch(call, monkeypatch):
    expected = call(table(), output="whole.tsv")[1]
    computed = scoring.Scorer._with_images
    sizes = []

    def small(self, pairs):
        sizes.append(len(pairs))
        if len(pairs) > 2:
            raise MemoryError
        return computed(self, pairs)

    monkeypatch.setattr(scoring.Scorer, "_with_images", small)
    lines = call(table(), output="halved.tsv")[1]
    assert sizes == [5, 3, 2, 1, 2]
    for line, other in zip(lines, expected):
        assert list(map(float, line[1:4])) == pytest.approx(list(map(float, other[1:4])), abs=2e-5)


def test_arguments_in_another_order_are_refused(call, tmp_path):
    (tmp_path / "scores.tsv").write_bytes(table())
    status, _, err = call(table())
    assert status == 2 and re.search("OUTPUT .* the order is MODEL DATA OUT", err)


def test_captions_are_not_replaced_by_scores(call, tmp_path):
    (tmp_path / "scores.tsv").write_text("r0\t一只猫\n", encoding="utf-8")
    status, _, err = call(table())
    assert status == 2 and "scores.tsv exists and is not scores" in err
    assert call(table(), output="new.tsv")[0] == call(table(), "--restart", output="new.tsv")[0] == 0
