"""predict.py, from rows of every kind to lines of results."""

import base64
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import predict
from paddlemix.datasets.tsv import TRUNCATED
from paddlemix.inference import prediction
from paddlemix.inference.captioner import BROKEN_ANSWER
from paddlemix.inference.results import REPEATING, ResultsWriter
from paddlemix.inference.row_shards import merge_shards
from paddlemix.models.mgen_vl import captioning
from paddlemix.models.mgen_vl.captioning import Candidate
from paddlemix.utils import cli
from tests.helpers import image_base64, image_bytes
from tests.inference.talking import save_talking_model
from tools import merge_results

STARTS, FINISHED = "------predicting starts------", "------predicting finished-----"
FALLBACK = "一张广告图片。"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_talking_model(tmp_path_factory.mktemp("weights") / "tiny model", seed=5)


@pytest.fixture
def call(tmp_path, model, monkeypatch, capfd):
    """call(content, *flags) → (exit status, output lines as (id, caption), stdout, stderr)."""

    def run(content, *flags, output="out.tsv", weights=model, source="in.tsv"):
        source = tmp_path / source
        if content is not None:
            source.write_bytes(content)
        target = tmp_path / output
        flags = flags if "--max_new_tokens" in flags else (*flags, "--max_new_tokens", "8")
        monkeypatch.setattr(sys, "argv", ["predict.py", str(source), str(target), str(weights), *flags])
        capfd.readouterr()
        status = cli.run(predict.main)
        said = capfd.readouterr()
        lines = None
        if target.exists() and status != 2:
            data = target.read_bytes().decode("utf-8")
            assert data == "" or data.endswith("\n")
            lines = [tuple(line.split("\t")) for line in data.split("\n")[:-1]]
            assert all(len(line) == 2 for line in lines)
        return status, lines, said.out, said.err

    return run


def tsv(*rows):
    return b"".join(b"\t".join(x if isinstance(x, bytes) else x.encode() for x in row) + b"\n" for row in rows)


def image(seed=0, **kwargs):
    return image_base64(seed, **kwargs)


def test_what_it_prints_and_writes(call, tmp_path):
    content = tsv(("b", image(1)), ("a", image(2)), ("c", image(3)))
    status, lines, out, err = call(content)
    assert status == 0
    assert [name for name, _ in lines] == ["b", "a", "c"]
    assert out.split("\n") == [STARTS, *(caption for _, caption in lines), FINISHED, ""]
    assert len({caption for _, caption in lines}) == 3
    assert "rows at a time" in err and " on cpu in float32" in err
    assert sorted(os.listdir(tmp_path)) == ["in.tsv", "out.tsv", "out.tsv.run.json"]


def test_batch_size_and_order_change_nothing(call):
    rows = [(str(i), image(i)) for i in range(7)]
    _, alone, _, _ = call(tsv(*rows), "--batch_size", "1")
    assert call(tsv(*rows), "--batch_size", "4")[1] == alone
    assert call(tsv(*rows[::-1]), "--batch_size", "3")[1] == alone[::-1]


def encoded(picture, format="PNG", **kwargs) -> str:
    """A PIL image as base64 of a file."""
    file = io.BytesIO()
    picture.save(file, format, **kwargs)
    return base64.b64encode(file.getvalue()).decode()


def decoded(text: str):
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(text)))


def picture(seed=0, size=(40, 30)):
    from PIL import Image

    return Image.open(io.BytesIO(image_bytes(seed, size=size, format="PNG")))


def kinds_of_rows():
    """{kind: (columns, outcome, image)}: what docs/predict.md promises of each kind of row.

    columns: all of the row; an id of None stands for the kind. outcome: "caption", "caption, truncated image", or the
    reason why there is the fallback caption. image: base64 of an image that has the same caption, or None.
    """
    from PIL import Image

    plain, jpeg = image(4), image_bytes(4)
    first, second = picture(1), picture(2)
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = np.zeros((30, 40), dtype=np.uint8)
    alpha[:, :20] = 255
    see_through = picture(3).convert("RGB")
    see_through.putalpha(Image.fromarray(alpha))
    palette = see_through.quantize(16)
    over_white = Image.alpha_composite(Image.new("RGBA", (40, 30), "white"), palette.convert("RGBA")).convert("RGB")
    grey = np.arange(40 * 30, dtype=np.uint16).reshape(30, 40) * 50
    cmyk = first.convert("CMYK")
    long_image = image_bytes(5, size=(300, 300))
    # A JPEG with rubbish behind it is still a picture.
    huge = base64.b64encode(jpeg + bytes((38 << 20) - len(jpeg))).decode()
    good, cut = "caption", "caption, truncated image"
    return {
        "JPEG": ((None, plain), good, plain),
        "a third column": ((None, plain, "一只\t猫"), good, plain),
        "url-safe base64, no padding": (
            (None, base64.urlsafe_b64encode(jpeg).decode().rstrip("=")), good, plain
        ),
        "base64 wrapped with blanks": ((None, " ".join(textwrap.wrap(plain, 76)) + " "), good, plain),
        "data URI": ((None, "data:image/jpeg;base64," + plain), good, plain),
        "50 MB line": ((None, huge), good, plain),
        "truncated JPEG": ((None, base64.b64encode(long_image[: len(long_image) // 2])), cut, None),
        "CMYK": ((None, encoded(cmyk, "JPEG")), good, encoded(decoded(encoded(cmyk, "JPEG")).convert("RGB"))),
        "16 bits per channel": (
            (None, encoded(Image.fromarray(grey))), good, encoded(Image.fromarray((grey >> 8).astype(np.uint8)))
        ),
        "palette with alpha": ((None, encoded(palette)), good, encoded(over_white)),
        "animated GIF": (
            (None, encoded(first.quantize(), "GIF", save_all=True, append_images=[second.quantize()])),
            good,
            encoded(first.quantize()),
        ),
        "EXIF rotation": (
            (None, encoded(first, exif=turned)), good, encoded(first.transpose(Image.ROTATE_270))
        ),
        "1 × 1": ((None, encoded(picture(1, size=(1, 1)))), good, None),
        "10000 × 1": ((None, encoded(picture(1, size=(10000, 1)))), good, None),
        "doubled id": (("JPEG", image(6)), good, image(6)),
        "id with odd characters": (("a b“'\x01\u2028%s\\n/..", plain), good, plain),
        "missing column": ((None,), "missing column", None),
        "empty image": ((None, ""), "empty image", None),
        "empty image, with a caption": ((None, "", "words"), "empty image", None),
        "bad base64": ((None, "not base64!!"), "bad base64", None),
        "non-ASCII in the image column": ((None, "图片"), "bad base64", None),
        "non-image bytes": ((None, base64.b64encode(b"just some words, no picture")), "not an image", None),
        "half a header": ((None, base64.b64encode(jpeg[:20])), "not an image", None),
        "over the pixel cap": (
            (None, encoded(Image.new("1", (20000, 20000)))), "too many pixels", None
        ),
        "line over 64 MB": ((None, huge, "x" * (14 << 20)), "line too long", None),
    }  # fmt: skip


def test_every_kind_of_row_has_its_outcome(call, tmp_path, root):
    kinds = kinds_of_rows()
    rows, wanted, alike = [], [], {}
    for kind, ((name, *columns), outcome, same) in kinds.items():
        name = kind if name is None else name
        wanted.append((name, outcome))
        rows.append((name, *columns))
        if same is not None:
            # Behind it, a plain row with what the model is to see of it.
            alike[len(rows) - 1] = len(rows)
            wanted.append((f"as {kind}", "caption"))
            rows.append((f"as {kind}", same))
    flags = ("--fallback", "没有 图片", "--max_new_tokens", "24", "--stop_repeating", "0")
    status, lines, _, err = call(tsv(*rows), *flags)
    assert status == 0
    assert [name for name, _ in lines] == [name for name, _ in wanted]
    for (name, caption), (_, outcome) in zip(lines, wanted):
        assert (caption == "没有 图片") == (not outcome.startswith("caption")), name
    for i, j in alike.items():
        assert lines[i][1] == lines[j][1], lines[i][0]
    # One model that tells everything the same would pass so far.
    assert len({lines[j][1] for j in alike.values()}) >= 6

    reasons = [outcome.split(", ")[-1] for _, outcome in wanted if outcome != "caption"]
    sidecar = json.loads((tmp_path / "out.tsv.run.json").read_text())
    assert sidecar["notes"] == {reason: reasons.count(reason) for reason in reasons}
    assert sidecar["rows"] == len(rows)
    fallen = len(reasons) - reasons.count("truncated image")
    assert f"{tmp_path / 'out.tsv'}: {len(rows)} rows\n" in err
    assert f"{fallen} rows have the fallback caption 没有 图片" in err and "2 × empty image" in err

    # The page for users promises the same.
    page = (root / "docs" / "predict.md").read_text("utf-8")
    table = re.findall(r"^\| ([^|]+) \| (caption[^|]*|fallback: [^|]+) \|", page, re.MULTILINE)
    promised = {kind: outcome.replace("fallback: ", "") for kind, outcome in table}
    assert promised == {kind: outcome for kind, (_, outcome, _) in kinds.items()}


def test_line_endings_bom_and_blank_lines(call):
    plain = call(tsv(("a", image(1)), ("b", image(2))))[1]
    dressed = b"\xef\xbb\xbf" + tsv(("a", image(1))).replace(b"\n", b"\r\n\r\n") + f"b\t{image(2)}".encode()
    assert call(dressed)[1] == plain


def test_rows_without_an_id_have_their_line_number(call):
    content = tsv((image(1), "caption"), (image(2),), ("", image(3)), ("id \xe9".encode("latin1"), image(4)))
    status, lines, _, _ = call(content)
    assert status == 0
    assert [name for name, _ in lines] == ["1", "2", "3", "id \ufffd"]
    assert [caption == FALLBACK for _, caption in lines] == [False, True, False, False]


def test_an_empty_file_gives_an_empty_file(call):
    for content in (b"", b"\n \r\n"):
        status, lines, out, err = call(content)
        assert (status, lines) == (0, [])
        assert out == f"{STARTS}\n{FINISHED}\n"
        assert "has no rows" in err


def test_all_rows_bad_is_a_failed_job_with_a_whole_output(call):
    status, lines, out, err = call(tsv(("a", "!"), ("b",)))
    assert status == 1
    assert lines == [("a", FALLBACK), ("b", FALLBACK)]
    assert FINISHED in out
    assert err.strip().split("\n")[-1].startswith("error: not one of the 2 rows could be captioned: ")


@pytest.mark.parametrize(
    "content, flags, says",
    [
        (None, (), "cannot read"),
        (b"\x1f\x8b\x08", (), "gunzip"),
        (b"a\tb\n", ("--fallback", "\t "), "--fallback must hold text"),
        (b"a\tb\n", ("--device", "tpu"), "the device is cpu, gpu or gpu:N, not 'tpu'"),
    ],
)
def test_bad_usage_is_one_line_and_2(call, tmp_path, content, flags, says):
    status, lines, _, err = call(content, *flags)
    assert (status, lines) == (2, None)
    last = err.strip().split("\n")[-1]
    assert last.startswith("error: ") and says in last and "Traceback" not in err
    # Nothing is left that would stand in the way of the next try.
    assert not (tmp_path / "out.tsv.partial").exists()


def test_bad_numbers_and_the_input_as_output(call, tmp_path, monkeypatch):
    for bad in ("--batch_size=0", "--batch_size=x", "--max_new_tokens=-3", "--dtype=int8", "--bath_size=3"):
        status, _, _, err = call(b"a\tb\n", bad)
        assert status == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and "predict.py --help" in err
    status, _, _, err = call(b"a\tb\n", output="in.tsv")
    assert status == 2 and "in.tsv would be overwritten" in err
    assert (tmp_path / "in.tsv").read_bytes() == b"a\tb\n"
    for ending in (".partial", ".run.json"):
        (tmp_path / f"out.tsv{ending}").symlink_to("in.tsv")
        status, lines, _, err = call(b"a\tb\n")
        assert (status, lines) == (2, None) and f"in.tsv would be overwritten by {tmp_path}/out.tsv{ending}" in err
        assert (tmp_path / "in.tsv").read_bytes() == b"a\tb\n"
        (tmp_path / f"out.tsv{ending}").unlink()


def test_the_folder_that_holds_the_model(call, model, tmp_path):
    content = tsv(("a", image(1)))
    assert call(content, weights=os.path.dirname(model))[:2] == call(content)[:2]
    status, _, _, err = call(content, weights=tmp_path)
    assert status == 2 and "no config.json" in err


def test_an_interrupted_run_goes_on(call, tmp_path, monkeypatch):
    content = tsv(*((str(i), image(i) if i != 1 else "bad!") for i in range(8)))
    _, whole, _, _ = call(content, "--batch_size", "2", output="whole.tsv")

    wanted = ResultsWriter.write

    def stop_at_5(self, *args):
        if self.done == 5:
            raise KeyboardInterrupt
        wanted(self, *args)

    monkeypatch.setattr(ResultsWriter, "write", stop_at_5)
    status, lines, out, _ = call(content, "--batch_size", "2")
    assert (status, lines) == (130, None)
    assert FINISHED not in out
    monkeypatch.setattr(ResultsWriter, "write", wanted)

    # The rows before are not read again.
    begun = []
    read_rows = prediction.read_rows
    monkeypatch.setattr(
        prediction, "read_rows", lambda *a, **kw: begun.append(kw.get("offset", 0)) or read_rows(*a, **kw)
    )
    # Half a line more, as a kill leaves it.
    with open(tmp_path / "out.tsv.partial", "ab") as journal:
        journal.write("5\t一".encode()[:-1])
    # Other settings are refused; nothing is decoded or answered twice by the same ones.
    status, _, _, err = call(content, "--prompt", "Else?")
    assert status == 2 and "settings.prompt" in err
    status, lines, out, err = call(content, "--batch_size", "4")
    assert (status, lines) == (0, whole)
    assert "resuming after the 5 rows of an earlier run" in err
    assert begun[-1] == len(b"".join(content.splitlines(True)[:5]))
    assert out.split("\n")[1:-2] == [caption for _, caption in whole[5:]]
    assert "1 × bad base64" in err


def test_image_files_that_change_between_two_runs_are_noticed(call, tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(number))
    table = b"0\t0.jpg\n1\tgone.jpg\n2\t2.jpg\n3\t3.jpg\n"
    _, whole, _, _ = call(table, output="whole.tsv")
    wanted = ResultsWriter.write
    monkeypatch.setattr(ResultsWriter, "write", lambda self, *a: wanted(self, *a) if self.done < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(table, "--batch_size", "1")
    monkeypatch.setattr(ResultsWriter, "write", wanted)
    (tmp_path / "0.jpg").write_bytes(image_bytes(2))
    status, _, _, err = call(table)
    assert status == 1 and "0.jpg has changed since an earlier run answered its row (line 2 of" in err
    # The same image, copied anew.
    (tmp_path / "0.jpg").write_bytes(image_bytes(0))
    status, lines, _, err = call(table)
    assert (status, lines) == (0, whole) and "resuming after the 3 rows" in err


@pytest.mark.parametrize("change", ["cut", "grown"])
def test_an_input_that_changes_while_it_is_read_is_said(call, tmp_path, monkeypatch, change):
    content = tsv(*((str(i), image(i)) for i in range(3)))
    source = tmp_path / "in.tsv"
    hashed = prediction.input_facts

    def then_changed(path):
        facts = hashed(path)
        source.write_bytes(content[:-50] if change == "cut" else content * 2)
        return facts

    monkeypatch.setattr(prediction, "input_facts", then_changed)
    status, lines, _, err = call(content)
    assert (status, lines) == (1, None)
    assert f"it had {len(content):,} bytes and has {source.stat().st_size:,} now" in err


def test_restart_drops_an_unfinished_run(call, tmp_path):
    content = tsv(("a", image(1)))
    (tmp_path / "out.tsv.partial").write_text('{"format": 2}\na\told\t\n')
    assert call(content)[0] == 2
    status, lines, _, _ = call(content, "--restart")
    assert status == 0 and lines[0][1] != "old"


def test_a_journal_of_other_rows_is_refused(call, tmp_path, monkeypatch):
    content = tsv(("a", image(1)), ("b", image(2)))
    wanted = ResultsWriter.finish
    monkeypatch.setattr(ResultsWriter, "finish", lambda self, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(content)
    monkeypatch.setattr(ResultsWriter, "finish", wanted)
    journal = tmp_path / "out.tsv.partial"
    header, first, second = journal.read_bytes().splitlines(True)
    for changed in ([header, second], [header, second, first], [header, first, first, second]):
        journal.write_bytes(b"".join(changed))
        status, lines, _, err = call(content)
        assert (status, lines) == (1, None)
        assert "is not of row" in err
    # One that begins in the middle of a row.
    journal.write_bytes(header + re.sub(rb"\d+\n$", b"9\n", first))
    status, lines, _, err = call(content)
    assert (status, lines) == (1, None) and "no line of" in err
    # A journal that was whole already needs no model to be finished.
    journal.write_bytes(header + first + second)
    monkeypatch.setattr(prediction, "load_model", None)
    assert call(content)[0] == 0


def test_shards_joined_are_the_run_in_one(call, tmp_path, monkeypatch):
    """Three shards, each with other batches; the bytes are those of one run."""
    monkeypatch.setattr("paddlemix.utils.progress.LOG_SECONDS", 0.0)
    rows = [(f"id {i % 5}", image(i) if i not in (2, 3) else "bad!") for i in range(8)]
    content = tsv(*rows, (image(9),)) + b"\n"
    assert call(content, output="whole.tsv")[0] == 0
    for shard, batch in (("3/3", "4"), ("1/3", "1"), ("2/3", "2")):
        status, lines, _, err = call(content, "--shard", shard, "--batch_size", batch)
        assert (status, lines) == (0, None)
        # The bar: rows done of those of the shard, and the time left. A blank line counts as a row until the end.
        last = [line for line in err.splitlines() if line.startswith("captions: ")][-1]
        assert re.search(r"captions: 100%.*(2/2|3/3) \[\d+:\d+<\d+:\d+", last)
    shard = tmp_path / "out.tsv.shard-2-of-3"
    assert shard.read_text("utf-8").count("\n") == 3
    merge = [str(tmp_path / "out.tsv"), "--input", str(tmp_path / "in.tsv")]
    assert run_merge(merge) == 0
    for ending in ("", ".run.json"):
        assert (tmp_path / f"out.tsv{ending}").read_bytes() == (tmp_path / f"whole.tsv{ending}").read_bytes()


def run_merge(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["merge_results.py", *arguments])
        return cli.run(merge_results.main)


def test_a_shard_goes_on_and_keeps_to_itself(call, tmp_path, monkeypatch):
    content = tsv(*((str(i), image(i)) for i in range(8)))
    _, whole, _, _ = call(content, output="whole.tsv")
    wanted = ResultsWriter.write

    def stop_at_2(self, *args):
        if self.done == 2:
            raise KeyboardInterrupt
        wanted(self, *args)

    monkeypatch.setattr(ResultsWriter, "write", stop_at_2)
    assert call(content, "--shard", "2/2", "--batch_size", "1")[0] == 130
    monkeypatch.setattr(ResultsWriter, "write", wanted)
    # An unfinished shard is not joined.
    assert call(content, "--shard", "1/2")[0] == 0
    assert run_merge([str(tmp_path / "out.tsv")]) == 2
    # The journal of a shard is of that shard only.
    journal = tmp_path / "out.tsv.shard-2-of-2.partial"
    (tmp_path / "out.tsv.shard-1-of-3.partial").write_bytes(journal.read_bytes())
    status, _, _, err = call(content, "--shard", "1/3")
    assert status == 2 and "shard.index is 2 there and 1 here" in err
    (tmp_path / "out.tsv.shard-1-of-3.partial").unlink()
    status, _, _, err = call(content, "--shard", "2/2")
    assert status == 0 and "resuming after the 2 rows" in err
    assert run_merge([str(tmp_path / "out.tsv")]) == 0
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()


def test_a_whole_shard_is_not_answered_again(call, tmp_path, monkeypatch):
    """paddle.distributed.launch starts every process again, also those that were done when another was killed."""
    content = tsv(("a", image(1)), ("b", image(2)), ("c", "!"))
    path = tmp_path / "out.tsv.shard-1-of-2"
    load = prediction.load_model

    def loads(*flags, content=content):
        """Whether the command loads the model; the shard is whole and of that command then."""
        loaded = []
        monkeypatch.setattr(prediction, "load_model", lambda *given: loaded.append(given) or load(*given))
        status, _, _, err = call(content, "--shard", "1/2", *flags)
        assert status == 0 and ("is already complete" in err) == (not loaded)
        return bool(loaded)

    assert loads()
    before = path.read_bytes()
    assert not loads() and not loads("--batch_size", "1")
    assert path.read_bytes() == before
    assert loads("--restart") and loads("--max_new_tokens", "3") and loads()
    assert loads(content=content + tsv(("d", image(3)))) and loads()
    path.write_bytes(before.replace(b"a\t", b"x\t"))
    assert loads() and path.read_bytes() == before
    (tmp_path / "out.tsv.shard-1-of-2.run.json").write_text("{")
    assert loads() and not loads()


def test_shards_of_bad_rows(call, tmp_path, capfd):
    content = tsv(("a", "!"), ("b", image(1)), ("c", "!"), ("d", "!"))
    assert [call(content, "--shard", f"{i}/5")[0] for i in range(1, 6)] == [0] * 5
    assert (tmp_path / "out.tsv.shard-5-of-5").read_bytes() == b""
    assert run_merge([str(tmp_path / "out.tsv")]) == 0
    for path in tmp_path.glob("out.tsv*"):
        path.unlink()
    content = tsv(("a", "!"), ("b", ""))
    assert [call(content, "--shard", f"{i}/2")[0] for i in (1, 2)] == [0, 0]
    assert run_merge([str(tmp_path / "out.tsv")]) == 1
    assert (tmp_path / "out.tsv").read_text("utf-8") == f"a\t{FALLBACK}\nb\t{FALLBACK}\n"
    assert "error: not one of the 2 rows could be captioned" in capfd.readouterr().err


def test_a_launched_process_takes_its_share(call, tmp_path, monkeypatch):
    content = tsv(("a", image(1)), ("b", image(2)), ("c", image(3)))
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    status, _, _, err = call(content, "--shard", "1/2")
    assert status == 2 and "gives each process its shard" in err
    assert call(content)[0] == 0
    assert (tmp_path / "out.tsv.shard-2-of-2").read_text("utf-8").startswith("b\t")


@pytest.mark.parametrize("bad", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_shards_that_are_none(call, bad):
    status, _, _, err = call(b"a\tb\n", f"--shard={bad}")
    assert status == 2 and "i/n with i from 1 to n" in err and err.count("\n") == 1


def test_repairs_are_made_before_a_caption_is_written(call, tmp_path, monkeypatch):
    says = "请描述图片内容:一只黑猫,一只黑猫,旁边有 盆花"

    def saying(model, tokenizer, prompts, *options):
        return ((number, [Candidate(says)]) for number, _ in enumerate(prompts))

    monkeypatch.setattr(captioning, "generate_captions", saying)
    content = tsv(("a", image(1)), ("b", "!"))
    assert call(content)[1] == [("a", says), ("b", FALLBACK)]
    flags = ["--strip_echo", "--full_width", "--cut_repeats", "--max_chars", "8", "--end_mark"]
    status, lines, out, _ = call(content, *flags)
    assert lines == [("a", "一只黑猫。"), ("b", FALLBACK)]
    assert "一只黑猫。" in out.split("\n")
    # They are settings of the run, so a journal with others is not gone on with.
    monkeypatch.setattr(ResultsWriter, "finish", lambda self, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(content, *flags)
    status, _, _, err = call(content, *flags[:-1])
    assert status == 2 and "settings.postprocess.end_mark is True there and None here" in err


def test_a_log_of_many_bad_rows_stays_short(call, monkeypatch):
    monkeypatch.setattr(prediction, "LOG_EVERY", 10)
    content = tsv(("good", image(1)), *((f"bad{i}", "!") for i in range(25)))
    status, lines, _, err = call(content)
    assert status == 0 and len(lines) == 26
    assert [line.split(" - ")[1] for line in err.split("\n") if "bad base64 (" in line] == [
        f"line {n + 1}, id 'bad{n - 1}': bad base64 (number {n})" for n in (1, 10, 20)
    ]


def test_on_a_terminal_the_bar_makes_room(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    prediction.show("一只猫")
    assert capsys.readouterr().out == "一只猫\n"


# ---- decoding


HOT = ("--temperature", "1.5", "--top_p", "0.95", "--seed", "3")


def n_best(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def without_scores(path):
    """Their last digits depend on the rows that were computed together."""
    return re.sub(r'"score": -\d+\.\d+', "", path.read_text("utf-8"))


def test_samples_go_by_the_rows_place_in_the_input(call, tmp_path, monkeypatch):
    """The same for every number of rows at a time, for shards, and for a run that was stopped and went on."""
    rows = [(str(i), image(1) if i != 2 else "bad!") for i in range(7)]
    status, whole, _, _ = call(tsv(*rows), *HOT)
    assert status == 0
    # The same image each time: only the row's number makes a difference.
    assert len({caption for _, caption in whole}) == 7
    assert call(tsv(*rows), *HOT, "--batch_size", "2")[1] == whole
    assert call(tsv(*rows), *HOT[:-1], "4")[1] != whole

    listed = ("--samples", "3", "--choose", "logprob", "--n_best")
    whole = call(tsv(*rows), *HOT, *listed, str(tmp_path / "n.jsonl"))[1]
    candidates = n_best(tmp_path / "n.jsonl")
    assert [row["id"] for row in candidates] == [name for name, _ in whole]
    for (_, caption), row in zip(whole, candidates):
        if row["id"] == "2":
            assert row["candidates"] == [] and row["chosen"] is None and caption == FALLBACK
            continue
        scores = [one["score"] for one in row["candidates"]]
        assert len(scores) == 3 and max(scores) < 0 and row["chosen"] == scores.index(max(scores))
        assert caption == row["candidates"][row["chosen"]]["text"]
    assert len({one["text"] for row in candidates for one in row["candidates"]}) == 18

    flags = (*HOT, *listed, str(tmp_path / "shards.jsonl"))
    assert [call(tsv(*rows), *flags, "--shard", f"{i}/3", output="s.tsv")[0] for i in (1, 2, 3)] == [0] * 3
    assert run_merge([str(tmp_path / "s.tsv")]) == 0
    assert (tmp_path / "s.tsv").read_bytes() == (tmp_path / "out.tsv").read_bytes()
    assert without_scores(tmp_path / "shards.jsonl") == without_scores(tmp_path / "n.jsonl")

    write = ResultsWriter.write

    def stop_at_4(self, *fields):
        if self.done == 4:
            raise KeyboardInterrupt
        write(self, *fields)

    flags = (*HOT, *listed, str(tmp_path / "k.jsonl"))
    monkeypatch.setattr(ResultsWriter, "write", stop_at_4)
    assert call(tsv(*rows), *flags, output="k.tsv")[0] == 130
    monkeypatch.setattr(ResultsWriter, "write", write)
    # The line of the row whose result was not written any more, and half a line.
    partial = tmp_path / "k.jsonl.partial"
    assert len(n_best(partial)) == 5
    with open(partial, "a") as file:
        file.write('{"id": "x')
    for other in (flags[:-1] + (str(tmp_path / "x.jsonl"),), ("--top_k", "5", *flags), flags[2:]):
        status, _, _, err = call(tsv(*rows), *other, output="k.tsv")
        assert status == 2 and "belongs to a different run: settings." in err
    kept = partial.read_bytes()
    partial.write_bytes(kept.replace(b'"1"', b'"9"', 1))
    status, _, _, err = call(tsv(*rows), *flags, output="k.tsv")
    assert status == 2 and "does not hold the candidates of row 2" in err
    # A power cut lost the last lines, or left zeros in their place.
    journal = (tmp_path / "k.tsv.partial").read_bytes()
    for lost in (b"", b"\0" * 300, b"\0" * 300 + b"\n"):
        partial.write_bytes(b"".join(kept.splitlines(keepends=True)[:2]) + lost)
        status, lines, _, err = call(tsv(*rows), *flags, output="k.tsv")
        assert status == 0 and lines == whole and "candidates of 2 rows of 4" in err and "after the 2 rows" in err
        assert without_scores(tmp_path / "k.jsonl") == without_scores(tmp_path / "n.jsonl")
        for done in ("k.jsonl", "k.tsv", "k.tsv.run.json"):
            (tmp_path / done).unlink()
        (tmp_path / "k.tsv.partial").write_bytes(journal)
    status, _, _, err = call(tsv(*rows), *flags, output="k.tsv")
    assert status == 2 and "does not hold the candidates of row 1" in err
    # As if the kill had come between the two files' ends.
    partial.touch()
    partial.rename(tmp_path / "k.jsonl")
    (tmp_path / "k.jsonl").write_bytes(kept)
    status, lines, _, err = call(tsv(*rows), *flags, output="k.tsv")
    assert status == 0 and lines == whole and "resuming after the 4 rows" in err
    assert without_scores(tmp_path / "k.jsonl") == without_scores(tmp_path / "n.jsonl")
    assert not list(tmp_path.glob("*.partial"))


def test_beams(call, tmp_path):
    rows = tsv(("a", image(1)), ("b", image(2)))
    greedy = call(rows)[1]
    path = str(tmp_path / "n.jsonl")
    status, lines, _, _ = call(rows, "--num_beams", "3", "--samples", "3", "--n_best", path, "--length_penalty", "1")
    assert status == 0 and lines != greedy
    assert call(rows, "--num_beams", "3", "--length_penalty", "1", "--batch_size", "3")[1] == lines
    for (_, caption), row in zip(lines, n_best(tmp_path / "n.jsonl")):
        scores = [one["score"] for one in row["candidates"]]
        assert row["chosen"] == 0 and row["candidates"][0]["text"] == caption
        assert scores == sorted(scores, reverse=True) and len(scores) == 3


def test_a_caption_that_repeats_itself_is_cut_and_counted(call, tmp_path, monkeypatch):
    cut = base64.b64encode(image_bytes(5, size=(300, 300))[:4000])
    content = tsv(("a", image(1)), ("b", cut))
    greedy = call(content, "--max_new_tokens", "60")
    assert REPEATING not in greedy[3]
    monkeypatch.setattr(
        "paddlemix.models.mgen_vl.engine._cycle", lambda tokens, repeats, is_number: repeats == 4 and len(tokens) == 9
    )
    status, lines, _, err = call(content, "--max_new_tokens", "60")
    assert status == 0 and "answers end after 4 repetitions" in err
    assert [len(caption) for _, caption in lines] == [9, 9]
    assert f"1 × {REPEATING}" in err and f"1 × {TRUNCATED}, {REPEATING}" in err and "fallback" not in err
    record = json.loads((tmp_path / "out.tsv.run.json").read_text("utf-8"))
    assert record["notes"] == {REPEATING: 1, f"{TRUNCATED}, {REPEATING}": 1}
    assert call(content, "--max_new_tokens", "60", "--stop_repeating", "0")[1] == greedy[1]


@pytest.mark.parametrize("flags", [(), HOT, ("--num_beams", "2")], ids=["greedy", "sampling", "beams"])
def test_logits_that_are_no_numbers_cost_their_row(call, tmp_path, monkeypatch, flags):
    from paddlemix.processors.images import MGenVLImageProcessor

    rows = [("a", image(1)), ("b", image(2)), ("c", image(3, size=(50, 70)))]
    fine = call(tsv(*rows), *flags)[1]
    seen = MGenVLImageProcessor.__call__

    def broken(self, picture):
        pixels = seen(self, picture)
        return pixels * np.float32("nan") if picture.size == (50, 70) else pixels

    monkeypatch.setattr(MGenVLImageProcessor, "__call__", broken)
    status, lines, _, err = call(tsv(*rows), *flags)
    assert status == 0 and lines == [*fine[:2], ("c", FALLBACK)]
    assert f"1 × {BROKEN_ANSWER}" in err


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--num_beams=2", "--top_p=0.5"], "--num_beams searches, --top_p samples"),
        (["--top_p=0"], "--top_p: must be a number above 0 and at most 1"),
        (["--num_beams=2", "--samples=3"], "2 beams have 2 answers at most"),
        (["--num_beams=0"], "of at least 1 and at most 64"),
        (["--batch_size=1000000000"], "of at least 1 and at most 4,096"),
        (["--length_penalty=1"], "give --num_beams with it"),
        (["--seed=1"], "--seed without sampling"),
        (["--choose=first"], "give --samples with it"),
        (["--samples=2", "--choose=best"], "invalid choice"),
        (["--repetition_penalty=0"], "of at least 1e-06 and at most 100"),
        (["--temperature=1e-39"], "of at least 1e-06 and at most 100"),
        (["--min_new_tokens=9"], "--min_new_tokens is more than --max_new_tokens"),
        (["--num_beams=2", "--stop_repeating=4"], "--stop_repeating does not go with --num_beams"),
        (["--stop_repeating=1"], "--stop_repeating 1 would end every answer"),
        (["--samples=2", "--n_best={out}"], "would be written to twice"),
        (["--samples=2", "--n_best={out}.partial"], "would be written to twice"),
    ],
)
def test_options_that_cannot_be(call, tmp_path, flags, says, monkeypatch):
    monkeypatch.setattr(prediction, "load_model", None)
    flags = [flag.format(out=tmp_path / "out.tsv") for flag in flags]
    status, lines, _, err = call(tsv(("a", image(1))), *flags)
    assert (status, lines) == (2, None) and says in err and err.count("\n") == 1


def test_more_samples_than_memory_holds(call, monkeypatch):
    monkeypatch.setattr("paddlemix.inference.captioner.free_memory", lambda device: 8 << 20)
    for name in ("samples", "num_beams"):
        status, lines, _, err = call(tsv(("a", image(1))), f"--{name}=60", "--max_new_tokens", "200")
        assert (status, lines) == (2, None)
        assert re.search(rf"error: --{name} 60 is more than the memory of cpu holds: about \d rows at a time", err)
    assert call(tsv(("a", image(1))), "--samples=2")[0] == 0


# ---- as a user runs it


@pytest.mark.slow
def test_sigkill_at_any_time_and_an_ascii_locale(model, root, tmp_path):
    # The fallback caption is Chinese, so it is printed too.
    rows = [(str(i), image(i) if i != 1 else "bad!") for i in range(40)]
    (tmp_path / "in.tsv").write_bytes(tsv(*rows))
    command = [sys.executable, str(root / "predict.py"), "in.tsv", "out.tsv", model]
    command += ["--max_new_tokens", "8", "--batch_size", "2"]
    environment = dict(os.environ, LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal = tmp_path / "out.tsv.partial"
    try:
        while first.stdout.readline():
            if journal.exists() and journal.read_bytes().count(b"\n") > 7:
                break
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    done = journal.read_bytes().count(b"\n") - 1
    assert 5 < done < 40 and not (tmp_path / "out.tsv").exists()
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert second.returncode == 0, second.stderr.decode()
    assert b"resuming after the" in second.stderr
    killed = (tmp_path / "out.tsv").read_text("utf-8")
    assert killed.count("\n") == 40

    # The same rows in one go, in this process.
    prediction.predict_file(
        str(tmp_path / "in.tsv"), str(tmp_path / "whole.tsv"), model, max_new_tokens=8, batch_size=8
    )
    assert (tmp_path / "whole.tsv").read_text("utf-8") == killed


def test_records_and_tables_give_what_their_tsv_gives(call, tmp_path):
    """A val.json with images in it or referred to, a TSV of paths, a CSV of paths: the captions of the same images."""
    from paddlemix.datasets.labels import Options, convert

    rows = [(f"ad{n}", image(n), f"标题{n}") for n in range(4)]
    _, expected, _, _ = call(tsv(*rows))
    captions = [caption for _, caption in expected]
    for images in ("inline", "reference"):
        convert(str(tmp_path / "in.tsv"), str(tmp_path / images), Options(val_every=1, images=images), True)
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(image_bytes(number))
    (tmp_path / "t.tsv").write_text("".join(f"ad{n}\tpictures/{n}.jpg\n" for n in range(4)))
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"pictures/{n}.jpg,x\n" for n in range(4)))
    for name, ids in (
        ("inline/val.json", [f"identity_{n}" for n in range(4)]),
        ("reference/val.json", [f"identity_{n}" for n in range(4)]),
        ("t.tsv", [f"ad{n}" for n in range(4)]),
        ("t.csv", [f"pictures/{n}.jpg" for n in range(4)]),
    ):
        status, lines, _, err = call(None, source=name)
        assert (status, lines) == (0, list(zip(ids, captions))), name
    call(None, "--shard", "1/2", source="t.csv", output="shared")
    call(None, "--shard", "2/2", source="t.csv", output="shared")
    merged = merge_shards(str(tmp_path / "shared"), str(tmp_path / "t.csv"))
    assert merged["rows"] == 4
    assert (tmp_path / "shared").read_text() == "".join(f"pictures/{n}.jpg\t{captions[n]}\n" for n in range(4))


def test_paths_that_cannot_be_read_get_the_fallback(call, tmp_path):
    (tmp_path / "a.jpg").write_bytes(image_bytes(1))
    rows = [("a", "a.jpg"), ("b", "gone.jpg"), ("c", "../a.jpg"), ("d", "https://host/a.jpg")]
    status, lines, _, err = call(tsv(*rows))
    assert status == 0 and [name for name, _ in lines] == list("abcd")
    assert [caption == FALLBACK for _, caption in lines] == [False, True, True, True]
    assert "1 × no such file" in err and "1 × image path leads out" in err and "1 × image is a URL" in err


def test_records_that_ask_something_else_are_said(call, tmp_path):
    record = {"id": "a", "conversations": [["图中有什么？", "x"]], "image": image(1)}
    (tmp_path / "val.json").write_text(json.dumps([record]))
    assert "have the prompt '图中有什么？': pass it as --prompt" in call(None, source="val.json")[3]
    assert "pass it as --prompt" not in call(None, "--prompt", "图中有什么？", source="val.json")[3]


@pytest.mark.parametrize("there", ["tsv", "json"])
def test_an_output_that_is_an_input_is_refused(call, tmp_path, there):
    content = tsv(("a", image(1))) if there == "tsv" else json.dumps([{"id": "a", "image": image(1)}]).encode()
    (tmp_path / "test.tsv").write_bytes(content)
    status, _, _, err = call(tsv(("a", "一只猫")), output="test.tsv")
    assert status == 2 and "holds images or records, not results: the order is INPUT OUTPUT MODEL" in err
    assert (tmp_path / "test.tsv").read_bytes() == content


def test_an_output_of_another_kind_is_refused(call, tmp_path):
    (tmp_path / "notes.md").write_text("# Notes\n")
    status, _, _, err = call(tsv(("a", image(1))), output="notes.md")
    assert status == 2 and "notes.md exists and is not results" in err
    status, _, _, err = call(tsv(("a", image(1))), "--samples", "2", "--n_best", str(tmp_path / "notes.md"))
    assert status == 2 and "notes.md exists and is not a file of --n_best" in err
    assert (tmp_path / "notes.md").read_text() == "# Notes\n"


CHILD = """
import sys, time, types
import paddlemix
from paddlemix.inference import prediction
from paddlemix.inference.captioner import Answer

class Captioner:
    '''Takes three milliseconds per row and knows it by its base64.'''
    batch_size = workers = 1
    decoding = types.SimpleNamespace(stop_repeating=0)
    def __init__(self, *args, **kwargs): pass
    def captions(self, images, numbers):
        for image in images:
            time.sleep(0.003)
            yield image if isinstance(image, Answer) else Answer("一只" + bytes(image[:8]).decode())

prediction.load_model = lambda *args: types.SimpleNamespace(
    model=None, tokenizer=None, image_processor=None, template=None)
prediction.Captioner = Captioner
from paddlemix.utils import cli
sys.exit(cli.run(lambda: prediction.predict_file(*sys.argv[1:4])))
"""


@pytest.fixture
def child(tmp_path, root):
    """Of CHILD on 900 rows, each seventh without an image: (command, arguments of Popen, what OUTPUT is to hold)."""
    chance = random.Random(20241123)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    rows = [(f"row {i}", f"{chance.getrandbits(64):016x}") if i % 7 else (f"row {i}",) for i in range(900)]
    (tmp_path / "in.tsv").write_bytes(tsv(*rows))
    captions = [FALLBACK if len(row) == 1 else "一只" + row[1][:8] for row in rows]
    expected = "".join(f"{row[0]}\t{caption}\n" for row, caption in zip(rows, captions))
    environment = dict(os.environ, PYTHONPATH=str(root), PYTHONIOENCODING="utf-8")
    command = [sys.executable, "-c", CHILD, "in.tsv", "out.tsv", "weights"]
    return command, {"cwd": tmp_path, "env": environment}, expected


def test_a_reader_that_goes_away_ends_no_run(child, tmp_path):
    command, starts, expected = child
    done = subprocess.Popen(command, **starts, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done.stdout.readline()
    done.stdout.close()
    # One warning, then that reader leaves too.
    while b"no longer be printed (Broken pipe)" not in done.stderr.readline():
        assert done.poll() is None
    done.stderr.close()
    assert done.wait() == 0
    assert (tmp_path / "out.tsv").read_text("utf-8") == expected


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments(child, tmp_path):
    """Without a model, so that only what is written counts; every kill leaves off somewhere else."""
    command, starts, expected = child
    chance = random.Random(20241123)
    starts.update(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    done = []
    for _ in range(3):
        child = subprocess.Popen(command, **starts)
        for _ in range(chance.randint(20, 150)):
            child.stdout.readline()
        time.sleep(chance.random() / 100)
        child.kill()
        child.communicate()
        journal = tmp_path / "out.tsv.partial"
        done.append(journal.read_bytes().count(b"\n") - 1)
        # A kill falls between two writes; a power cut may leave any part of the last one.
        journal.write_bytes(journal.read_bytes()[: -chance.randint(0, 30) or None])
    assert 0 < done[0] < done[1] < done[2] < expected.count("\n")
    assert subprocess.run(command, **starts).returncode == 0
    assert (tmp_path / "out.tsv").read_text("utf-8") == expected
    assert json.loads((tmp_path / "out.tsv.run.json").read_text())["notes"] == {"missing column": 129}


@pytest.mark.slow
def test_launched_on_two_processes(root, model, tmp_path):
    rows = [(str(i), image(i)) for i in range(5)]
    (tmp_path / "in.tsv").write_bytes(tsv(*rows))
    launch = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", "log"]
    command = [str(root / "predict.py"), "in.tsv", "out.tsv", model, "--max_new_tokens", "8", "--device", "cpu"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([*launch, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_merge([str(tmp_path / "out.tsv"), "--input", str(tmp_path / "in.tsv")]) == 0
    source, whole = str(tmp_path / "in.tsv"), tmp_path / "whole.tsv"
    prediction.predict_file(source, str(whole), model, max_new_tokens=8, batch_size=8)
    assert (tmp_path / "out.tsv").read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_ten_real_rows_through_run_sh(shared, root, model, tmp_path):
    """The platform's own call on real input, in a submission folder whose path has spaces."""
    submission = tmp_path / "my work" / "submission"
    (submission / "src").mkdir(parents=True)
    (submission / "weights").mkdir()
    shutil.copy(root / "run.sh", submission)
    shutil.copy(root / "predict.py", submission / "src")
    shutil.copytree(root / "paddlemix", submission / "src" / "paddlemix", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(model, submission / "weights" / "a model")
    (tmp_path / "my work" / "dataset").mkdir()
    samples = shared / "real_samples" / "test_samples.txt"
    shutil.copy(samples, tmp_path / "my work" / "dataset")

    paths = ["../../dataset/test_samples.txt", "../../dataset/results.txt", "../weights"]
    done = subprocess.run(["sh", "run.sh", *paths, sys.executable], cwd=submission, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "my work" / "dataset" / "results.txt").read_text("utf-8").split("\n")
    assert lines.pop() == ""
    ids = [line.split("\t")[0] for line in samples.read_text("utf-8").splitlines()]
    assert len(ids) == 10
    assert [line.split("\t")[0] for line in lines] == ids
    captions = [line.split("\t")[1] for line in lines]
    assert FALLBACK not in captions and all(captions)
    assert done.stdout.split("\n") == [STARTS, *captions, FINISHED, ""]
