"""From a TSV to train.json: rows that are taken, mended captions, rejects and their reasons."""

import base64
import errno
import itertools
import json
import os
import random
import re
import shutil

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix.datasets import blocks, cleaning, json_index, labels, tsv
from paddlemix.datasets.chatml import ChatmlDataset
from paddlemix.datasets.cleaning import mend_caption
from paddlemix.datasets.labels import Options, convert
from paddlemix.processors.images import MGenVLImageProcessor
from paddlemix.utils import parallel
from paddlemix.utils.errors import JobFailed, UserError
from tests.helpers import byte_vocab_tokenizer, image_base64, image_bytes, refused

JPEG = image_base64(0)


@pytest.fixture
def run(tmp_path):
    """run(lines, …) → (train records, val records, rejected lines, result)"""

    def run(lines, out="out", **options):
        path, out_dir = tmp_path / "in.tsv", tmp_path / out
        if lines is not None:
            path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))
        result = convert(str(path), str(out_dir), Options(**options), disable_progress=True)
        train, val = (json.loads((out_dir / name).read_bytes()) for name in ("train.json", "val.json"))
        assert (result.n_train, result.n_val) == (len(train), len(val))
        rejected = (out_dir / "rejected.tsv").read_text(encoding="utf-8").splitlines()
        assert sum(result.rejected.values()) == len(rejected)
        return train, val, [tuple(line.split("\t")) for line in rejected], result

    return run


def row(number, caption=None, image=JPEG):
    return f"ad{number}\t{image}\t{f'标题{number}' if caption is None else caption}\n"


def test_the_notebooks_counts(run, tmp_path):
    train, val, rejected, _ = run(row(number) for number in range(991))
    assert (len(train), len(val), rejected) == (941, 50, [])
    assert val[1] == {"id": "identity_20", "conversations": [["请描述图片内容", "标题20"]], "image": JPEG}
    assert [record["id"] for record in train[:20]] == [f"identity_{n}" for n in [*range(1, 20), 21]]
    out = tmp_path / "out"
    template = json.loads((out / "chat_template.json").read_text())
    assert template == {
        "conversation": ["<|im_start|>user\n{{user}}<|im_end|>\n", "<|im_start|>assistant\n{{bot}}<|im_end|>\n"]
    }
    assert sorted(os.listdir(out)) == sorted([*labels.OUTPUTS, ".train.json.idx", ".val.json.idx"])
    # One record per line.
    assert len((out / "train.json").read_text().split("\n")) == 941 + 3


@pytest.mark.parametrize("images", ["inline", "reference"])
def test_the_index_is_written_with_the_file(run, tmp_path, images):
    run((row(number) for number in range(45)), images=images)
    for name in ("train.json", "val.json"):
        path = str(tmp_path / "out" / name)
        content = (tmp_path / "out" / name).read_bytes()
        written = json_index._load_index(path)
        assert [json.loads(content[a:b]) for a, b in written] == json.loads(content)
        assert np.array_equal(written[:, 0], json_index.scan_records(path)[:, 0])


def test_rejected_rows_do_not_count(run, tmp_path):
    bad = ["id only\n", "x\t!!!!\tcaption\n", f"y\t{JPEG}\n", f"z\t{JPEG}\t \n"]
    bad.append(b"w\t" + JPEG.encode() + b"\t\xff\n")
    lines = [row(n) if n % 3 else bad[n // 3 % 5] for n in range(90)]
    train, val, rejected, result = run([*lines, "\n", "  \r\n"])
    assert (len(train), len(val)) == (57, 3)
    assert result.rejected == {
        tsv.MISSING_COLUMN: 6,
        labels.BAD_BASE64: 6,
        tsv.NO_CAPTION: 6,
        tsv.EMPTY_CAPTION: 6,
        tsv.CAPTION_NOT_UTF8: 6,
    }
    assert rejected[:3] == [
        ("1", "id only", "missing column"), ("4", "x", "bad base64"), ("7", "y", "no caption"),
    ]  # fmt: skip
    ids = [line.split("\t") for line in (tmp_path / "out" / "ids.tsv").read_text().splitlines()]
    assert ids[:3] == [["identity_0", "ad1", "2"], ["identity_1", "ad2", "3"], ["identity_2", "ad4", "5"]]
    assert len(ids) == 60


@pytest.mark.parametrize("val_every, wanted", [(1, (0, 10)), (3, (6, 4)), (0, (10, 0)), (100, (9, 1))])
def test_val_every(run, val_every, wanted):
    train, val, _, _ = run((row(number) for number in range(10)), val_every=val_every)
    assert (len(train), len(val)) == wanted
    assert {record["id"] for record in train + val} == {f"identity_{n}" for n in range(10)}


def test_captions_and_prompts_are_kept_as_they_are(run):
    captions = ['"quoted" \\ back', "tab\tin it\t", " blanks ", "\x01\x7f", "😀\u2028x", "</s><|im_end|>", "a\rb"]
    train, _, _, _ = run([f"i\t{JPEG}\t{caption}\n" for caption in captions], val_every=0, prompt='描述"这张"图\n片')
    assert [record["conversations"] for record in train] == [[['描述"这张"图\n片', caption]] for caption in captions]


def test_rows_without_ids_crlf_and_bom(run, tmp_path):
    train, _, rejected, _ = run(["\ufeff", f"{JPEG}\tone\ttwo\r\n", f"b\t{JPEG}\tthree"], val_every=0)
    assert [record["conversations"][0][1] for record in train] == ["one\ttwo", "three"]
    assert rejected == []
    assert (tmp_path / "out" / "ids.tsv").read_text() == "identity_0\t\t1\nidentity_1\tb\t2\n"


@pytest.mark.parametrize("images", ["inline", "reference"])
def test_base64_in_any_form(run, tmp_path, images):
    data = image_bytes(3)
    plain = base64.b64encode(data).decode()
    forms = [
        plain,
        plain.rstrip("="),
        plain.replace("+", "-").replace("/", "_"),
        "data:image/jpeg;base64," + plain,
        " ".join(plain[i : i + 76] for i in range(0, len(plain), 76)),
    ]
    bad = [plain[:50] + char + plain[50:] for char in '"\\*.,:@[]^`{}~é\0'] + [plain[:-1] + "=a", "A" * 21]
    lines = [f"i\t{text}\tcaption\n" for text in forms + bad]
    train, _, rejected, _ = run(lines, val_every=0, images=images)
    assert len(train) == len(forms) and len(rejected) == len(bad)
    assert {reason for _, _, reason in rejected} == {labels.BAD_BASE64}
    if images == "inline":
        assert [base64.b64decode(record["image"], validate=True) for record in train[:1] + train[2:]] == [data] * 4
    tokenizer = byte_vocab_tokenizer(tmp_path)
    dataset = ChatmlDataset(str(tmp_path / "out" / "train.json"), None, tokenizer, MGenVLImageProcessor(56))
    wanted = dataset.sample(0)["images"]
    for index in range(1, len(forms)):
        assert np.array_equal(dataset.sample(index)["images"], wanted)


@pytest.mark.parametrize("images", ["inline", "reference"])
def test_long_images(run, tmp_path, images):
    """Longer than what is looked at in full with references, and longer than what is written at once."""
    rng = random.Random(0)
    texts = [base64.b64encode(rng.getrandbits(8 * n).to_bytes(n, "big")).decode() for n in (12287, 12289, 60_000)]
    texts.append(texts[2] * 60)
    places = [40, len(texts[2]) - 40] + [30_000] * (images == "inline")
    broken = [texts[2][:place] + '"' + texts[2][place + 1 :] for place in places]
    lines = [row(n, image=text) for n, text in enumerate(texts + broken)]
    train, _, rejected, _ = run(lines, val_every=0, images=images)
    assert len(train) == 4 and len(rejected) == len(broken)
    if images == "inline":
        assert [record["image"] for record in train] == texts
    else:
        content = (tmp_path / "in.tsv").read_bytes()
        for record, text in zip(train, texts):
            image = record["image"]
            assert image["file"] == "../in.tsv" and sorted(image) == ["check", "file", "length", "offset"]
            assert content[image["offset"] :][: image["length"]] == text.encode()


def test_references_survive_moving_both_together(run, tmp_path):
    run([row(0), row(1)], images="reference", val_every=0)
    (tmp_path / "moved").mkdir()
    for name in ("in.tsv", "out"):
        os.rename(tmp_path / name, tmp_path / "moved" / name)
    path = str(tmp_path / "moved" / "out" / "train.json")
    dataset = ChatmlDataset(path, None, byte_vocab_tokenizer(tmp_path), MGenVLImageProcessor(56))
    assert len(dataset[0]["images"]) == 1 and dataset.n_skipped == 0


def test_lengths(run):
    lines = [row(n, "字" * n) for n in range(1, 10)]
    train, _, rejected, _ = run(lines, val_every=0, min_chars=3, max_chars=7)
    assert [len(record["conversations"][0][1]) for record in train] == [3, 4, 5, 6, 7]
    assert [reason for _, _, reason in rejected] == ["caption too short"] * 2 + ["caption too long"] * 2


def test_dedupe(run):
    lines = [row(0, "a"), row(1, "b"), row(2, "a"), row(3, "a", image_base64(1)), row(4, "b"), row(5, "a\t")]
    train, _, rejected, _ = run(lines, val_every=0, dedupe=True)
    assert rejected == [("3", "ad2", "duplicate"), ("5", "ad4", "duplicate")]
    assert len(train) == 4
    assert len(run(None, val_every=0)[0]) == 6


def test_clean_and_what_follows_from_it(run):
    lines = [row(0, "好的。。"), row(1, "\u200b\x01"), row(2, "好的。")]
    train, _, rejected, _ = run(lines, val_every=0, clean=True, dedupe=True)
    assert [record["conversations"][0][1] for record in train] == ["好的。"]
    assert rejected == [("2", "ad1", "empty caption"), ("3", "ad2", "duplicate")]


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("一个，，杯子。。", "一个，杯子。"),
        ("好！！！真的？？", "好！真的？"),
        ("红色，。", "红色。"),
        ("红色，、,；蓝色", "红色；蓝色"),
        ("  多\t个\u3000空 格\n", "多 个 空 格"),
        ("a\x00b\x07c\u200bd\ufeffe", "abcde"),
        ("â€œæ–‡å­—â€\x9d", "“文字”"),
        ("cafÃ©", "café"),
        ("“引号”，（括号）：ＡＢ！", "“引号”，（括号）：ＡＢ！"),
        ("等等……——...", "等等……——..."),
        ("价格1,000,00元 10:30", "价格1,000,00元 10:30"),
        ("👨\u200d👩\u200d👧一家", "👨\u200d👩\u200d👧一家"),
        ("", ""),
    ],
)
def test_mend_caption(text, cleaned):
    assert mend_caption(text) == cleaned
    assert mend_caption(cleaned) == cleaned


# What ftfy might take for mojibake of what need not be mended: letters of single-byte encodings, and their neighbours.
_SUSPICIOUS = "—‘’“”…aA0 中，~<;#"


def _is_taken_as_plain(text):
    return cleaning._PLAIN.fullmatch(text)


def test_what_is_not_looked_at_is_what_ftfy_leaves_alone():
    for letters in itertools.product(_SUSPICIOUS, repeat=3):
        text = "".join(letters)
        assert not _is_taken_as_plain(text) or fix_text(text) == text
    every = "".join(letter for letter in map(chr, range(0x10000)) if cleaning._PLAIN.fullmatch(letter))
    assert len(every) > 20000 and fix_text(every) == every


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(_SUSPICIOUS + "&。、；！？,:!?éâ€œ\u3000\u00a0字"), max_size=16))
def test_cleaning_without_ftfy_is_cleaning_with_it(text):
    with pytest.MonkeyPatch.context() as patch:
        quick = mend_caption(text)
        patch.setattr(cleaning, "_PLAIN", re.compile("(?!)"))
        assert mend_caption(text) == quick


def fix_text(text):
    return ftfy.fix_text(text, fix_character_width=False, uncurl_quotes=False)


def test_ordinary_captions_are_not_given_to_ftfy(run, monkeypatch):
    """Nor those that need other mending."""
    caption = "画面左侧是一瓶白色面霜，文案写着“水润一整天……”，售价99元（原价￥199.00）——It's 100% fresh!"
    wanted = run([row(0, caption), row(1, "标题")])[:2]
    monkeypatch.setattr(ftfy, "fix_text", None)
    assert run([row(0, caption), row(1, "标题")], clean=True)[:2] == wanted
    assert mend_caption("红色，，  白色。。") == "红色， 白色。"


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("，。、；,;:!? \t字a…—"), max_size=12))
def test_clean_leaves_nothing_to_clean(text):
    cleaned = mend_caption(text)
    assert mend_caption(cleaned) == cleaned
    assert len(cleaned) <= len(text) and cleaned == cleaned.strip()


@pytest.mark.parametrize("images", ["inline", "reference"])
@pytest.mark.parametrize("verify", ["none", "header", "decode"])
def test_verify(run, verify, images):
    big = image_bytes(1, size=(300, 300))
    broken_pixels = bytearray(image_bytes(2, format="PNG"))
    broken_pixels[60:70] = bytes(10)
    pictures = {
        "good": image_bytes(0),
        "png": image_bytes(0, format="PNG"),
        "text": b"no picture at all, but base64",
        "cut": big[: len(big) // 2],
        "stub": big[:30],
        "pixels": bytes(broken_pixels),
        "last": image_bytes(4),
    }
    lines = [f"{name}\t{base64.b64encode(data).decode()}\tcaption\n" for name, data in pictures.items()]
    train, _, rejected, _ = run(lines * 3, val_every=0, verify=verify, images=images, workers=2)
    wrong = {
        "none": {},
        "header": {"text": "not an image", "stub": "broken image"},
        "decode": {
            "text": "not an image",
            "stub": "broken image",
            "cut": "truncated image",
            "pixels": "truncated image",
        },
    }[verify]
    found = {name: reason for _, name, reason in rejected}
    assert found.keys() == wrong.keys() and len(rejected) == 3 * len(wrong)
    assert found["text"] == wrong["text"] if wrong else True
    assert found.get("cut") == wrong.get("cut")
    # In the order of the input, good and bad alike.
    assert [int(line) for line, _, _ in rejected] == sorted(int(line) for line, _, _ in rejected)
    assert len(train) == 21 - len(rejected)


def test_verify_looks_behind_a_long_header():
    """The size of a JPEG may stand behind a profile of any length."""
    data = image_bytes(0)
    padded = data[:2] + (b"\xff\xe2\xea\x60" + bytes(59_998)) * 2 + data[2:]
    assert labels.header_problem(base64.b64encode(padded)) is None
    assert labels.decode_problem(base64.b64encode(padded)) is None


def test_a_decoder_that_dies_costs_its_image_alone(run, monkeypatch):
    """os.abort in place of a decoder's crash; the same worker has other rows, too."""
    monkeypatch.setattr(labels, "_decode_task", _die_on_marked)
    lines = [row(n, image=base64.b64encode(b"die" * 9 if n == 19 else b"ok" * 9).decode()) for n in range(22)]
    train, _, rejected, _ = run(lines, val_every=0, verify="decode", workers=1)
    assert rejected == [("20", "ad19", labels.DECODER_DIED)]
    assert len(train) == 21


def _die_on_marked(places):
    for path, offset, length, _ in places:
        with open(path, "rb") as file:
            content = file.read()
        if base64.b64decode(content[offset : offset + length])[:3] == b"die":
            os._exit(9)
    return [None] * len(places)


def test_memory_held_for_decoding_is_bounded(monkeypatch):
    """Rows wait for their images' results, but no more of them than _HELD_BYTES allow."""
    monkeypatch.setattr(labels, "_HELD_BYTES", 1000)
    monkeypatch.setattr(labels, "_decode_task", lambda places: [None] * len(places))
    drawn = []

    def stream():
        for number in range(500):
            item = tsv.TsvRow(number, "", b"", 0, 100, "", None, 0)
            drawn.append(number)
            yield labels.Checked(item, b"", "", None)

    for done, item in enumerate(labels._decode_checked(stream(), "", 8)):
        assert item.row.line_no == done
        assert len(drawn) - done <= 10 + parallel.CHUNK_ITEMS
    assert len(drawn) == 500


def test_nothing_usable_leaves_the_earlier_result(run, tmp_path):
    run([row(0), row(1)])
    before = (tmp_path / "out" / "train.json").read_bytes()
    with refused(JobFailed, "all-rejected", match="rejected.tsv"):
        run(["x\n", "y\n"])
    assert (tmp_path / "out" / "train.json").read_bytes() == before
    assert (tmp_path / "out" / "rejected.tsv").read_text() == "1\tx\tmissing column\n2\ty\tmissing column\n"
    with refused(JobFailed, "empty"):
        run(["\n"])
    assert not [name for name in os.listdir(tmp_path / "out") if "partial" in name]


def test_a_full_disk_ends_with_one_line_and_no_litter(run, tmp_path, monkeypatch):
    run([row(0), row(1)])
    before = (tmp_path / "out" / "train.json").read_bytes()

    def full(handle, pieces):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "writev", full)
    with refused(JobFailed, "disk"):
        run([row(n) for n in range(5000)])
    assert (tmp_path / "out" / "train.json").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path / "out") if "partial" in name]


def test_a_disk_without_room_for_the_images_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with refused(UserError, "disk", match="0.0 GB.*--images reference"):
        run([row(0)])
    assert not (tmp_path / "out").exists()
    assert len(run(None, images="reference")[1]) == 1


@pytest.mark.parametrize("change", ["cut", "grown", "edited"])
def test_an_input_that_changes_while_it_is_read_is_said(run, tmp_path, monkeypatch, change):
    lines = [row(number) for number in range(40)]
    path, done = tmp_path / "in.tsv", []
    check = labels.check_row

    def changing(row, options):
        done.append(row.id)
        if len(done) == 5:
            with open(path, "r+b") as file:
                if change == "cut":
                    file.truncate(len(lines[0]) * 20 + 10)
                else:
                    file.seek(*((0, os.SEEK_END) if change == "grown" else (3,)))
                    file.write(b"x")
            os.utime(path, ns=(1, 1))
        return check(row, options)

    monkeypatch.setattr(labels, "check_row", changing)
    monkeypatch.setattr(blocks, "BUFFER_BYTES", len(lines[0]))
    with refused(JobFailed, "changed", match=r"in.tsv .* [\d,]+ bytes .* [\d,]+ now"):
        run(lines)
    assert len(done) < 10
    assert not (tmp_path / "out").exists()


def test_short_writes_are_completed(run, monkeypatch):
    """The kernel may take less than it is given."""
    lines = [row(number) for number in range(100)]
    wanted = run(lines)[:2]
    whole = os.writev
    monkeypatch.setattr(os, "writev", lambda handle, pieces: whole(handle, [b"".join(pieces)[:100]]))
    monkeypatch.setattr(os, "write", lambda handle, data: whole(handle, [bytes(data[:5000])]))
    assert run(lines)[:2] == wanted


def test_the_input_is_never_overwritten(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(row(0))
    with refused(UserError, "overlap"):
        convert(str(path), str(tmp_path), Options(), disable_progress=True)
    assert path.read_text() == row(0)


def test_ids_with_odd_characters_stay_in_their_column(run, tmp_path):
    run([f"a\x01\r\u2028b c\t{JPEG}\tcaption\n", "bad\x0bid\u0085\n"], val_every=0)
    assert (tmp_path / "out" / "ids.tsv").read_text() == "identity_0\ta b c\t1\n"
    assert (tmp_path / "out" / "rejected.tsv").read_text() == "2\tbad id \tmissing column\n"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "a", "id 1", "字", "\x00", '"']),
            st.sampled_from([JPEG, "", "QUJD", "QUI=", "QQ==", "QQ=", "Q", "!!", "data:image/png;base64,QUJD", "-_-_"]),
            st.text(st.characters(blacklist_characters="\n\r", blacklist_categories=("Cs",)), max_size=6),
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(["inline", "reference"]),
)
def test_every_row_is_a_record_or_rejected(tmp_path_factory, rows, images):
    tmp_path = tmp_path_factory.mktemp("labels")
    lines = ["\t".join(row).encode() for row in rows]
    (tmp_path / "in.tsv").write_bytes(b"\n".join(lines))
    rows = [line for line in lines if line.strip()]
    options = Options(val_every=2, images=images)
    try:
        result = convert(str(tmp_path / "in.tsv"), str(tmp_path / "out"), options, disable_progress=True)
    except JobFailed:
        assert not (tmp_path / "out" / "train.json").exists()
        rejected = tmp_path / "out" / "rejected.tsv"
        # Of an empty file nothing is written.
        assert rejected.exists() == bool(rows) and (not rows or len(rejected.read_text().splitlines()) == len(rows))
        return
    assert result.n_train + result.n_val + sum(result.rejected.values()) == len(rows)
    train, val = (json.loads((tmp_path / "out" / name).read_bytes()) for name in ("train.json", "val.json"))
    captions = [record["conversations"][0][1] for record in train + val]
    assert all(caption.strip() for caption in captions)
    assert result.n_val == -(-(result.n_train + result.n_val) // 2)


@pytest.mark.parametrize("byte", range(256))
def test_every_byte_is_a_letter_of_base64_or_not(byte):
    text = base64.b64encode(bytes(range(256)))[:-4]
    letter = bytes([byte]).isalnum() or byte in b"+/"
    for place in (0, 100, len(text) - 1):
        spoilt = text[:place] + bytes([byte]) + text[place + 1 :]
        padded = byte == ord("=") and place == len(text) - 1
        assert labels._is_plain_base64(spoilt, all_of_it=True) == (letter or padded)


def test_a_bad_image_among_many_costs_itself_alone(run):
    text = base64.b64encode(bytes(300)).decode()
    images = [text] * 20
    images[7] = text[:50] + "*" + text[51:]
    images[9] = text[:-1] + "=" + text[1:4]
    train, val, rejected, _ = run(f"i{n}\t{image}\tcaption\n" for n, image in enumerate(images))
    assert rejected == [("8", "i7", "bad base64"), ("10", "i9", "bad base64")]
    assert {record["image"] for record in train + val} == {text}


@pytest.mark.parametrize("images", ["inline", "reference"])
@pytest.mark.parametrize("verify", ["none", "header", "decode"])
@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_tables_of_image_files(run, tmp_path, images, verify, kind):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(image_bytes(number))
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    names = ["images/0.jpg", "images/1.jpg", "images/gone.jpg", "../in.tsv.jpg", "images/broken.jpg", "images/2.jpg"]
    if kind == "tsv":
        lines = [f"ad{n}\t{name}\t标题{n}\n" for n, name in enumerate(names)]
    else:
        lines = ["id,image,caption\n", *(f"ad{n},{name},标题{n}\n" for n, name in enumerate(names))]
    train, _, rejected, _ = run(lines, val_every=0, images=images, verify=verify, workers=1)
    reasons = {id_: reason for _, id_, reason in rejected}
    broken = {} if verify == "none" else {"ad4": "not an image"}
    assert reasons == {"ad2": "no such file", "ad3": tsv.PATH_LEADS_OUT, **broken}
    good = [record for record in train if record["conversations"][0][1] != "标题4"]
    if images == "inline":
        assert [base64.b64decode(record["image"]) for record in good] == [image_bytes(n) for n in range(3)]
    else:
        assert [record["image"] for record in good] == [{"file": f"../images/{n}.jpg"} for n in range(3)]
    tokenizer = byte_vocab_tokenizer(tmp_path)
    dataset = ChatmlDataset(str(tmp_path / "out" / "train.json"), None, tokenizer, MGenVLImageProcessor(56))
    processor = MGenVLImageProcessor(56)
    from paddlemix.processors.images import open_image

    wanted = [processor(open_image(image_bytes(number))) for number in range(3)]
    places = [number for number, record in enumerate(train) if record in good]
    assert all(np.array_equal(dataset.sample(place)["images"][0], pixels) for place, pixels in zip(places, wanted))


def test_captions_quoted_as_in_csv_are_said(run, tmp_path):
    """As csv.writer(delimiter="\\t") and DataFrame.to_csv(sep="\\t") write them."""
    import csv

    captions = ['他说"买一送一"', '"限时"特惠', "第一行\n第二行", "普通", "a\tb", '"品牌"']
    with open(tmp_path / "in.tsv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["id", "image_base64", "caption"])
        writer.writerows([f"id{number}", JPEG, caption] for number, caption in enumerate(captions))
    train, _, rejected, result = run(None, val_every=0)
    found = [record["conversations"][0][1] for record in train]
    assert found == ['他说"买一送一"', '"限时"特惠', '"第一行', "普通", "a\tb", '"品牌"']
    assert rejected == [("1", "id", "no image"), ("5", '第二行"', "missing column")]
    assert len(result.warnings) == 3
    assert "4 captions were quoted as in CSV (the first in line 2)" in result.warnings[0]
    assert "1 captions open a quote that their line does not close (the first in line 4)" in result.warnings[1]


def test_exchanged_columns_are_said(run):
    lines = [f"这是第{n}张广告图片。\t{JPEG}\tad{n}\n" for n in range(5)]
    assert "are two of them exchanged?" in run(lines)[3].warnings[0]
    assert not run([f"商品编号{n}\t{JPEG}\t这是第{n}张广告图片。\n" for n in range(5)])[3].warnings
    long = "这是一张很长的广告图片的描述。"
    with refused(JobFailed, "all-rejected", match="2 × image and caption exchanged; see "):
        run([f"ad0\t{long}\t{JPEG}\n", f"ad1\t短。\t{JPEG}\n"])


def test_the_reason_of_an_exchanged_row(run, tmp_path):
    long = "这是一张很长的广告图片的描述。"
    _, _, rejected, _ = run([f"ad0\t{long}\t{JPEG}\n", f"ad1\t短。\t{JPEG}\n", row(2), row(3)])
    assert [reason for _, _, reason in rejected] == [labels.EXCHANGED] * 2


@pytest.mark.parametrize("digest", ["d41d8cd98f00b204e9800998ecf8427e", "0e37df36-f698-11e6-8dd4-cb9ced3df976"])
def test_an_id_that_reads_as_base64_is_no_image(run, digest):
    """A table with an index in front: number, id, image, caption."""
    _, _, rejected, _ = run([f"0\t{digest}\t{JPEG}\t红杯\n", row(1), row(2)])
    assert rejected == [("1", "0", labels.EXCHANGED)]


def test_captions_with_further_columns_are_said(run):
    assert "3 captions hold a tab" in run([f"{JPEG}\t红杯\tad{n}\n" for n in range(3)])[3].warnings[0]
    assert not run([row(0, "红\t杯"), row(1), row(2)])[3].warnings


def test_base64_that_lost_its_plus_signs_is_rejected(run):
    """As a web form's encoding reads them: a space for each +."""
    plus = JPEG[:400] + "+" + JPEG[401:700] + "+" + JPEG[701:]
    _, _, rejected, _ = run([row(0), row(1), row(2, image=plus.replace("+", " "))])
    assert rejected == [("3", "ad2", labels.BAD_BASE64)]


def test_a_caption_that_training_would_refuse_is_rejected(run, tmp_path):
    train, _, rejected, _ = run([row(0, "长" * 199_993), row(1, "长" * 199_994), row(2, "x" * 9)], val_every=0)
    assert rejected == [("2", "ad1", labels.TOO_LONG)]
    dataset = ChatmlDataset(str(tmp_path / "out" / "train.json"), None, byte_vocab_tokenizer(tmp_path), None)
    assert len(dataset.record(0).turns[0][1]) == 199_993


def test_an_empty_set_is_said(run):
    assert "train.json is empty" in run([row(0)])[3].warnings[0]
    assert "val.json is empty (--val_every 0)" in run([row(0)], val_every=0)[3].warnings[0]
    assert run([row(0), row(1)])[3].warnings == []


def test_what_is_no_table_is_named(run, tmp_path):
    run([row(0), row(1)])
    with refused(UserError, "json-input"):
        convert(str(tmp_path / "out" / "train.json"), str(tmp_path / "two"), Options(), disable_progress=True)
    with refused(UserError, "argument-order"):
        convert(str(tmp_path / "in.tsv"), str(tmp_path / "in.tsv"), Options(), disable_progress=True)
    with refused(UserError, "not-regular"):
        convert(str(tmp_path / "out"), str(tmp_path / "in.tsv"), Options(), disable_progress=True)
    with pytest.raises(JobFailed, match="in a CSV whose header names image and caption"):
        run(["a,b,c\n", "1,2,3\n"])


# ---- captions from a model


def n_best(number, chosen):
    return json.dumps({"id": f"ad{number}", "chosen": chosen, "candidates": [{"text": "一"}, {"text": f"新{number}"}]})


@pytest.mark.parametrize("kind", ["results", "n_best"])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_captions_of_a_model_take_the_place_of_those_of_the_rows(run, tmp_path, kind, labelled):
    """Rows without a caption of their own are as good. A row that the model did not answer is rejected."""
    lines = [row(number) if labelled else f"ad{number}\t{JPEG}\n" for number in range(4)] + ["bad\n"]
    new = [f"ad{n}\t新{n}" if kind == "results" else n_best(n, 1) for n in (0, 1, 3)]
    new[1] = "ad1\t " if kind == "results" else n_best(1, None)
    (tmp_path / "results.txt").write_text("\n".join(new) + "\n")
    train, _, rejected, _ = run(lines, val_every=0, captions=str(tmp_path / "results.txt"))
    assert [record["conversations"][0][1] for record in train] == ["新0", "新3"]
    assert rejected == [
        ("2", "ad1", "no new caption"), ("3", "ad2", "no new caption"), ("5", "bad", "missing column"),
    ]  # fmt: skip


def test_captions_of_other_rows_are_refused(run, tmp_path):
    for text, code in [
        ("ad1\tx\nad0\tx\n", "ids"), ("ad0 x\n", "lines"),
        ('{"id": "ad0", "chosen": 5, "candidates": []}\n', "lines"),
    ]:  # fmt: skip
        (tmp_path / "results.txt").write_text(text)
        with refused(UserError, code):
            run([row(0), row(1)], captions=str(tmp_path / "results.txt"))
    (tmp_path / "results.txt").write_bytes(b"ad0\t\xff\n")
    with refused(UserError, "lines", match="line 1 "):
        run([row(0)], captions=str(tmp_path / "results.txt"))
