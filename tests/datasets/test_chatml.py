"""Samples from train.json files: every form a record may have, and every way it may be bad."""

import base64
import copy
import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from paddlemix.datasets import chatml, open_files
from paddlemix.datasets.chatml import ChatmlDataset, build_dataset
from paddlemix.datasets.collator import MGenVLCollator, raise_failure
from paddlemix.datasets.entries import Entry
from paddlemix.datasets.records import Record, SampleError, parse_record
from paddlemix.processors.images import MGenVLImageProcessor, decode_base64, open_image
from paddlemix.processors.mgen_vl_processing import encode_example
from paddlemix.utils.errors import ConfigError, UserError
from tests.helpers import byte_vocab_tokenizer, image_base64, image_bytes, refused

SIZE = 56
IMAGE_PROCESSOR = MGenVLImageProcessor(SIZE)


def record(number=0, **changes):
    made = {"id": f"identity_{number}", "conversations": [["描述", f"标题{number}"]], "image": image_base64(number)}
    made.update(changes)
    return {name: value for name, value in made.items() if value is not ...}


def write(path, records):
    """One record per line; a text stands as it is."""
    lines = [text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in records]
    path.write_bytes(("[\n" + ",\n".join(lines) + "\n]\n").encode("utf-8", "surrogatepass"))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_vocab_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(tmp_path, tokenizer):
    """make(records, …) → the dataset over them."""

    def make(records, name="train.json", **kwargs):
        path = write(tmp_path / name, records)
        return ChatmlDataset(path, kwargs.pop("chat_template", None), tokenizer, IMAGE_PROCESSOR, **kwargs)

    return make


def pixels(data):
    return IMAGE_PROCESSOR(open_image(data))


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_a_sample(make, tokenizer):
    dataset = make([record(0), record(1)])
    assert len(dataset) == 2
    sample = dataset[1]
    wanted = encode_example(tokenizer, [("描述", "标题1")], 1)
    assert np.array_equal(sample["input_ids"], wanted["input_ids"]) and sample["input_ids"].dtype == np.int64
    assert np.array_equal(sample["labels"], wanted["labels"])
    assert sample["images"].shape == (1, 3, SIZE, SIZE) and sample["images"].dtype == np.float32
    assert np.array_equal(sample["images"][0], pixels(image_bytes(1)))
    assert (sample["input_ids"] == tokenizer.img_pad_id).sum() == tokenizer.n_queries
    assert same(dataset[-1], sample)
    assert dataset.n_skipped == 0


def test_no_index_beyond_the_end(make):
    dataset = make([record(0)])
    for index in (1, -2):
        with pytest.raises(IndexError):
            dataset[index]
    assert len(list(dataset)) == 1


def test_settings_reach_the_sequence(make, tmp_path, tokenizer):
    template = tmp_path / "template.json"
    conversation = ["<|im_start|>human\n{{user}}<|im_end|>\n", "<|im_start|>model\n{{bot}}<|im_end|>\n"]
    template.write_text(json.dumps({"conversation": conversation, "system": "系统"}))
    long = record(0, conversations=[["描述", "字" * 500]])
    dataset = make([long], chat_template=str(template), max_length=100, label_all_turn_markers=False)
    sample = dataset[0]
    assert len(sample["input_ids"]) == 100
    text = tokenizer.decode(sample["input_ids"].tolist())
    assert "系统" in text and "<|im_start|>human" in text and "model" in text
    # The span is whole although the text was cut.
    assert (sample["input_ids"] == tokenizer.img_pad_id).sum() == tokenizer.n_queries
    assert (make([long], name="b.json")[0]["labels"] >= 0).sum() > (sample["labels"] >= 0).sum()


def test_image_forms(make, tmp_path):
    """Base64 text, a reference, an URI, url-safe text, a file named in the prompt: the same picture."""
    data = image_bytes(5)
    text = base64.b64encode(data).decode()
    (tmp_path / "rows.tsv").write_text(f"a\t{text}\tcaption\nb\t{text}\r\n{text}\tcaption\nc\t{text}")
    (tmp_path / "picture.jpg").write_bytes(data)
    offsets = [2, 2 + len(text) + 11, 2 + 2 * len(text) + 13]
    references = [{"file": "rows.tsv", "offset": offset, "length": len(text)} for offset in offsets]
    end = os.path.getsize(tmp_path / "rows.tsv") - len(text)
    references += [{"file": str(tmp_path / "rows.tsv"), "offset": end, "length": len(text)}]
    safe = text.replace("+", "-").replace("/", "_").rstrip("=")
    images = [text, [text], *references, [references[0]], "data:image/jpeg;base64," + text, safe]
    records = [record(0, image=image) for image in images]
    names = ["picture.jpg", str(tmp_path / "picture.jpg"), text, "data:image/jpeg;base64," + text]
    records += [
        record(0, image=..., conversations=[[f"Picture 1: <img>{name}</img>\n描述", "标题0"]]) for name in names
    ]
    # Tags that only name the image that "image" holds.
    records += [
        record(0, image=text, conversations=[[f"Picture 1: <img>{name}</img>\n描述", "标题0"]])
        for name in ("", "somewhere.jpg")
    ]
    dataset = make(records)
    first = dataset.sample(0)
    assert np.array_equal(first["images"][0], pixels(data))
    for index in range(1, len(records)):
        assert same(dataset.sample(index), first), records[index]


def test_several_images_and_turns(make, tmp_path, tokenizer):
    (tmp_path / "b.png").write_bytes(image_bytes(2, format="PNG"))
    turns = [["<img></img>和<img>b.png</img>有什么不同", "颜色"], ["还有<img></img>呢", "形状"]]
    dataset = make(
        [
            record(0, image=[image_base64(1), image_base64(3)], conversations=turns),
            record(1, image=[image_base64(1), image_base64(2), image_base64(3)]),
            record(2, image=...),
            record(3, image=None),
            record(4, image=[]),
        ]
    )
    first = dataset.sample(0)
    assert [np.array_equal(first["images"][k], pixels(image_bytes(k + 1))) for k in (0, 2)] == [True, True]
    assert np.array_equal(first["images"][1], pixels(image_bytes(2, format="PNG")))
    emptied = [(prompt.replace("b.png", ""), answer) for prompt, answer in turns]
    assert np.array_equal(first["input_ids"], encode_example(tokenizer, emptied, 3)["input_ids"])
    second = dataset.sample(1)
    assert len(second["images"]) == (second["input_ids"] == tokenizer.img_start_id).sum() == 3
    for index in (2, 3, 4):
        assert dataset.sample(index)["images"].shape == (0, 3, SIZE, SIZE)


def parsed(value):
    return parse_record(value if isinstance(value, bytes) else json.dumps(value).encode())


def test_records_are_read_with_what_stands_around_them():
    wanted = Record("identity_0", [("问", "答")], [])
    text = json.dumps(record(0, image=..., conversations=[["问", "答"]])).encode()
    for before, after in ((b"", b""), (b"[\n  ", b",\r\n"), (b"\xef\xbb\xbf[", b"]\n"), (b",", b"")):
        assert parsed(before + text + after) == wanted
    assert parsed({"id": 7, "conversations": [["a", "b"]]}).id == "7"
    assert parsed({"conversations": [["a", "b"]], "other": {}}).id == ""


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"id": "a"} {"id": "b"}', "not JSON"),
        (b'{"conversations": [["a", "b\n"]]}', "not JSON"),
        (b'{"id": "\xff"}', "not UTF-8"),
        (b'"text"', "not a JSON object"),
        (b"12", "not a JSON object"),
        (b"{}", "conversations"),
        (record(0, conversations=[]), "conversations"),
        (record(0, conversations="text"), "conversations"),
        (record(0, conversations=["ab"]), "conversations"),
        (record(0, conversations=[["a"]]), "conversations"),
        (record(0, conversations=[["a", 3]]), "conversations"),
        (record(0, conversations=[["a", "\ud800"]]), "surrogate"),
        (record(0, conversations=[["a", "b" * 200_001]]), "characters"),
        (record(0, id=["x"]), '"id"'),
        (record(0, image=3), "neither base64 text nor a reference"),
        (record(0, image=[["A"]]), "neither"),
        (record(0, image=[""]), "neither"),
        (record(0, image={"file": ""}), "not a reference"),
        (record(0, image={"file": "a", "offset": 1}), "not a reference"),
        (record(0, image={"file": "a", "offset": -1, "length": 4}), "not a reference"),
        (record(0, image={"file": "a", "offset": True, "length": 4}), "not a reference"),
        (record(0, image={"file": "a", "offset": 0, "length": 0}), "not a reference"),
        (record(0, image={"file": "a", "offset": 0, "length": 1 << 40}), "not a reference"),
        (record(0, image={"file": "a\0", "offset": 0, "length": 4}), "not a reference"),
        (record(0, image={"file": "", "offset": 0, "length": 4}), "not a reference"),
        (record(0, image=["A"] * 65), "65 images"),
        (record(0, image=["A", "B"], conversations=[["<img></img>", "c"]]), "1 <img> tags"),
        (record(0, image=["A"], conversations=[["<img>x</img><img>y</img>", "c"]]), "2 <img> tags"),
        (record(0, image=..., conversations=[["<img>http://host/a.jpg</img>", "c"]]), "URL"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
        (b'{"a": [' + b"{}," * 300_000 + b"{}]}", "too many brackets"),
        (b'{"a": ' + b"1" * 2_000_000 + b"}", "more than 20 digits"),
    ],
)
def test_bad_records(text, reason):
    with pytest.raises(SampleError, match=reason):
        parsed(text)


def test_bad_samples_are_refused_in_words(make, tmp_path):
    (tmp_path / "rows.tsv").write_text(f"a\t{image_base64(1)}\tcaption\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.jpg").write_bytes(b"")
    os.truncate(tmp_path / "large.jpg", 65 << 20)
    length = len(image_base64(1))

    def reference(file="rows.tsv", offset=2, length=length):
        return {"file": file, "offset": offset, "length": length}

    def prompt(text, image=...):
        return record(0, image=image, conversations=[[text, "b"]])

    cases = [
        (record(0, image="!!!!"), "base64"),
        (record(0, image=base64.b64encode(b"no picture").decode()), "not a JPEG"),
        (record(0, image=reference(offset=3)), "not the file it was"),
        (record(0, image=reference(length=length - 4)), "not the file it was"),
        (record(0, image=reference(length=length + 400)), "not the file it was"),
        (record(0, image=reference(offset=10**9)), "not the file it was"),
        (record(0, image=reference(file="missing.tsv")), "No such file"),
        (record(0, image=reference(file="pipe")), "not a plain file"),
        (record(0, image=reference(file="/dev/zero")), "not a plain file"),
        (record(0, image=reference(file=".")), "not a plain file"),
        (prompt("<img>large.jpg</img>"), "larger than"),
        (prompt("<img>missing.jpg</img>"), "base64"),
        (prompt("text", image=[image_base64(k) for k in range(64)]), "max_length"),
    ]
    dataset = make([case for case, _ in cases], max_length=300)
    for index, (_, reason) in enumerate(cases):
        with pytest.raises((UserError, OSError)) as caught:
            dataset.sample(index)
        assert reason in str(caught.value), cases[index]


def test_the_next_good_sample_takes_the_place(make, capsys):
    bad = record(1, image="!!!!")
    dataset = make([record(0), bad, '{"id": "broken', record(3), bad])
    good = [dataset.sample(index) for index in (0, 3)]
    assert same(dataset[1], good[1]) and dataset.n_skipped == 2
    # From the end the search goes on at the beginning.
    assert same(dataset[4], good[0]) and dataset.n_skipped == 3
    assert same(dataset[0], good[0]) and dataset.n_skipped == 3
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1 and "identity_1 (record 1 of " in lines[0] and "base64" in lines[0]


def test_failures_are_logged_at_first_and_then_rarely(make, capsys, monkeypatch):
    monkeypatch.setattr(chatml, "LOG_EVERY", 5)
    dataset = make([record(0), '{"no": "id"}', '{"id": 12, "conversations"}'])
    for _ in range(6):
        dataset[1]
    assert dataset.n_skipped == 12
    lines = capsys.readouterr().err.strip().split("\n")
    assert [("(1 so far)" in line, "(5 so far)" in line, "(10 so far)" in line) for line in lines] == [
        (True, False, False), (False, True, False), (False, False, True),
    ]  # fmt: skip
    assert "without an id (record 1" in lines[0] and "12 (record 2" in lines[2]


def test_nothing_good_is_an_error_and_not_a_loop(make, monkeypatch):
    dataset = make([record(number, image="!!!!") for number in range(30)] + [record(30)])
    record_sample = dataset[0]
    assert len(record_sample["images"]) == 1
    raise_failure(MGenVLCollator(0)([record_sample]))
    monkeypatch.setattr(chatml, "MAX_FAILURES_IN_A_ROW", 10)
    sample = dataset[0]
    assert dataset.n_skipped == 40
    batch = MGenVLCollator(0)([record_sample, sample])
    with pytest.raises(UserError, match="no good sample among 10 in a row, from record 0 on.*base64"):
        raise_failure(batch)
    # The rows of a batch with a failure are still those that could be read.
    assert len(batch["input_ids"]) == 2 and len(batch["images"]) == 1 and not batch["attention_mask"][1].any()


def test_an_error_of_any_kind_costs_one_sample(make, monkeypatch, capsys):
    dataset = make([record(0), record(1)])

    def fail(data):
        raise MemoryError("no memory for this one")

    good = dataset.sample(1)
    monkeypatch.setattr(chatml, "open_image", lambda data: open_image(data) if data == image_bytes(1) else fail(data))
    assert same(dataset[0], good)
    assert "MemoryError: no memory" in capsys.readouterr().err


def test_a_huge_record_is_not_read(tmp_path, tokenizer, make):
    """A record larger than what is read: only its own sample is lost."""
    dataset = make([record(0)])
    path = tmp_path / "huge.json"
    with open(path, "wb") as file:
        file.write(b"[\n" + json.dumps(record(0)).encode() + b',\n{"id": "huge", "image": "')
        file.seek(80 << 20, os.SEEK_CUR)
        file.write(b'"},\n' + json.dumps(record(2)).encode() + b"\n]\n")
    huge = ChatmlDataset(str(path), None, tokenizer, IMAGE_PROCESSOR)
    assert len(huge) == 3
    assert same(huge.sample(0), dataset.sample(0))
    with refused(SampleError, "size"):
        huge.sample(1)
    assert len(huge[1]["images"]) == 1


def test_a_file_cut_short_after_it_was_indexed(make, tmp_path):
    dataset = make([record(0), record(1)])
    os.truncate(tmp_path / "train.json", 100)
    with refused(SampleError, "truncated"):
        dataset.sample(1)


def test_the_original_tools_json(make, tmp_path, tokenizer):
    records = [record(number) for number in range(5)]
    lines = make(records)
    (tmp_path / "old.json").write_text(json.dumps(records, indent=4, ensure_ascii=False), encoding="utf-8")
    old = ChatmlDataset(str(tmp_path / "old.json"), None, tokenizer, IMAGE_PROCESSOR)
    assert len(old) == 5
    assert all(same(old.sample(index), lines.sample(index)) for index in range(5))


def test_several_files_and_patterns(tmp_path, tokenizer):
    (tmp_path / "sub").mkdir()
    for name, numbers in (("b", (0, 1)), ("a", (2,)), ("c", ()), ("sub/d", (3, 4, 5))):
        write(tmp_path / f"{name}.json", [record(number) for number in numbers])

    def ids(files):
        dataset = ChatmlDataset(files, None, tokenizer, IMAGE_PROCESSOR)
        return [dataset.record(index).id for index in range(len(dataset))]

    def names(numbers):
        return [f"identity_{number}" for number in numbers]

    top = str(tmp_path)
    (tmp_path / "t.tsv").write_text(f"a\t{image_base64(1)}\tcaption\n")
    assert ids(f"{top}/*.json") == names([2, 0, 1])
    assert ids([f"{top}/b.json", f"{top}/a.json"]) == names([0, 1, 2])
    assert ids([f"{top}/sub/d.json", f"{top}/[ab].json"]) == names([3, 4, 5, 2, 0, 1])
    assert ids(f"{top}/**/*.json") == names([2, 0, 1, 3, 4, 5])
    for files, says in (
        (f"{top}/x.json", "no such file"),
        (f"{top}/x*.json", "no file matches"),
        (top, "is a folder"),
        ([], "names no file"),
        ([f"{top}/a.json", f"{top}/*.json"], "more than once"),
        ([f"{top}/a.json", f"{top}/t.tsv"], "t.tsv holds no JSON records: if it is a table, convert it"),
        (f"{top}/c.json", "no records in .*c.json: convert more rows .*leave it out of `dataset`"),
    ):
        with pytest.raises(ConfigError, match=says):
            ChatmlDataset(files, None, tokenizer, IMAGE_PROCESSOR)


def test_a_file_that_is_replaced_during_a_run_is_read_to_its_end(tmp_path, tokenizer):
    path = write(tmp_path / "a.json", [record(0), record(1)])
    dataset = ChatmlDataset(path, None, tokenizer, IMAGE_PROCESSOR)
    os.replace(write(tmp_path / "b.json", [record(1), record(0, image=...), record(2)]), path)
    assert [dataset.record(index).id for index in range(2)] == ["identity_0", "identity_1"]


def test_a_record_without_an_answer_trains_nothing(tmp_path, tokenizer):
    """As a test set has them; a caption of blanks is none either."""
    records = [record(0, conversations=[["描述", " "]]), record(1, conversations=[["描述", ""], ["颜色？", "红"]])]
    dataset = ChatmlDataset(write(tmp_path / "a.json", records), None, tokenizer, IMAGE_PROCESSOR)
    with refused(SampleError, match="no answer"):
        dataset.sample(0)
    assert dataset[0]["input_ids"].tolist() == dataset.sample(1)["input_ids"].tolist()


def test_build_dataset(tmp_path, tokenizer):
    template = tmp_path / "template.json"
    conversation = ["<|im_start|>human\n{{user}}<|im_end|>\n", "<|im_start|>model\n{{bot}}<|im_end|>\n"]
    template.write_text(json.dumps({"conversation": conversation}))
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "rows.tsv").write_text(f"a\t{image_base64(1)}\tcaption\n")
    reference = {"file": "rows.tsv", "offset": 2, "length": len(image_base64(1))}
    first = write(tmp_path / "a.json", [record(0)])
    second = write(tmp_path / "far" / "b.json", [record(1, image=reference), record(2)])
    run = SimpleNamespace(max_length=200, label_all_turn_markers=False)
    entries = [
        Entry("chatml_dataset", (first,)),
        Entry("chatml_dataset", (second,), str(template)),
    ]
    dataset = build_dataset(entries, tokenizer, IMAGE_PROCESSOR, run)
    assert [dataset.record(index).id for index in range(len(dataset))] == ["identity_0", "identity_1", "identity_2"]
    texts = [tokenizer.decode(dataset[index]["input_ids"].tolist()) for index in range(3)]
    assert ["human" in text for text in texts] == [False, True, True]
    assert np.array_equal(dataset[1]["images"][0], pixels(image_bytes(1)))
    assert (dataset.max_length, dataset.label_all_turn_markers) == (200, False)


def test_limit_repeat_and_prompts_of_an_entry(tmp_path, tokenizer):
    paths = (write(tmp_path / "a.json", [record(i) for i in range(30)]),)
    paths += (write(tmp_path / "b.json", [record(i) for i in range(30, 60)] + [record(60, image=...)]),)
    run = SimpleNamespace(max_length=200, label_all_turn_markers=False)
    asked = ("图中有什么？", "写一句广告语", "请描述")

    def built(seed=1, **changes):
        return build_dataset([Entry("chatml_dataset", paths, **changes)], tokenizer, IMAGE_PROCESSOR, run, seed)

    def ids(dataset):
        return [int(dataset.record(i).id.split("_")[1]) for i in range(len(dataset))]

    limited = built(limit=20, repeat=2)
    assert len(limited) == 40 and ids(limited)[:20] == ids(limited)[20:] == sorted(set(ids(limited)))
    assert ids(built(limit=20)) == ids(limited)[:20] != ids(built(seed=2, limit=20))
    # Drawn from all files, not the first one's records.
    assert ids(limited)[19] > 30 and ids(limited)[0] < 30
    (source,) = limited.sources
    assert (source.records, source.samples) == (61, 40) and ids(built(limit=99)) == list(range(61))
    # Each sample is the record's own, wherever it stands.
    whole = built()
    for index in (3, 17, 39):
        assert same(limited[index], whole[ids(limited)[index]])
    prompted = built(prompt=asked, repeat=2)
    prompts = [prompted.record(i).turns[0][0] for i in range(122)]
    assert prompts[60] == "描述" and set(prompts[:60]) == set(asked) and prompts[:61] == prompts[61:]
    assert prompts != [built(2, prompt=asked, repeat=2).record(i).turns[0][0] for i in range(122)]
    assert prompted.question(0).answer == "标题0"
    # Later prompts keep their images, and the first one's are placed before its new text.
    turns = [["一<img></img>", "甲"], ["二<img></img>", "乙"]]
    talk = write(tmp_path / "talk.json", [record(0, conversations=turns, image=[image_base64(0), image_base64(1)])])
    several = build_dataset([Entry("chatml_dataset", (talk,), prompt=asked[:1])], tokenizer, IMAGE_PROCESSOR, run)
    questions = [text for text, _ in several.record(0).turns]
    assert questions == ["Picture 1: <img></img>\n图中有什么？", "二<img></img>"]
    assert len(several.sample(0)["images"]) == 2
    # The counted lengths are those of the samples, and kept apart from those of other prompts.
    for dataset in (prompted, limited, built(prompt=asked[:1]), whole):
        lengths = dataset.lengths().tokens.tolist()
        assert lengths == [len(dataset[i]["input_ids"]) for i in range(len(dataset))]


def test_open_files_are_few_and_not_shared(make, tmp_path, monkeypatch):
    monkeypatch.setattr(open_files, "MAX_OPEN_FILES", 3)
    images = []
    for number in range(6):
        (tmp_path / f"{number}.tsv").write_text(image_base64(number))
        images.append({"file": f"{number}.tsv", "offset": 0, "length": len(image_base64(number))})
    dataset = make([record(number, image=image) for number, image in enumerate(images)])
    for _ in range(2):
        for number in range(6):
            assert np.array_equal(dataset.sample(number)["images"][0], pixels(image_bytes(number)))
            assert len(dataset._files._files) <= 3
    again = copy.copy(dataset._files)
    assert pickle.loads(pickle.dumps(dataset._files))._files == again._files == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_paddles_loader(make, workers, capfd):
    """Batches are the same with workers; failures in workers are counted, and their last words heard."""
    import paddle

    records = [record(number) for number in range(7)] + [record(7, image="!!!!")]
    dataset = make(records)

    def loader(dataset):
        return paddle.io.DataLoader(
            dataset, batch_size=3, num_workers=workers, collate_fn=MGenVLCollator(dataset.tokenizer.pad_token_id)
        )

    batches = list(loader(dataset))
    assert dataset.n_skipped == 1
    wanted = [dataset.sample(index) for index in (0, 1, 2, 3, 4, 5, 6, 0)]
    assert [list(batch["images"].shape) for batch in batches] == [[3, 3, SIZE, SIZE]] * 2 + [[2, 3, SIZE, SIZE]]
    for number, sample in enumerate(wanted):
        batch, row = batches[number // 3], number % 3
        length = len(sample["input_ids"])
        assert np.array_equal(batch["input_ids"].numpy()[row, :length], sample["input_ids"])
        assert np.array_equal(batch["images"].numpy()[row], sample["images"][0])

    hopeless = make([record(0, image="!!!!")], name="hopeless.json")
    (batch,) = loader(hopeless)
    with pytest.raises(UserError, match="no good sample among 1 in a row"):
        raise_failure(batch)
    assert hopeless.n_skipped == 1


def test_text_is_base64_when_no_such_file_exists(tmp_path):
    text = image_base64(1)
    value = json.dumps({"conversations": [[f"<img>{text}</img>", "b"]]}).encode()
    assert parse_record(value, str(tmp_path)).images == [text]
    assert decode_base64(text) == image_bytes(1)
