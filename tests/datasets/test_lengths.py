"""Lengths of samples, counted without images and kept beside the data."""

import json
import multiprocessing
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix.datasets import lengths
from paddlemix.datasets.chatml import ChatmlDataset
from paddlemix.processors.images import MGenVLImageProcessor
from paddlemix.processors.mgen_vl_processing import ChatTemplate, LengthCounter, encode_example
from paddlemix.utils.errors import UserError
from tests.helpers import byte_vocab_tokenizer, image_base64

OTHER = ChatTemplate(("<|im_start|>Q: ", "<|im_end|>"), ("<|im_start|>A: ", "<|im_end|>\n"), "Be short.")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_vocab_tokenizer(str(tmp_path_factory.mktemp("vocabulary")))


def write(path, records):
    path.write_text("[\n" + ",\n".join(records) + "\n]\n")
    return str(path)


def record(number, caption="words", **values):
    return json.dumps(dict({"id": str(number), "conversations": [["what?", caption]]}, **values))


def test_a_repeated_file_is_measured_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(lengths, "_load", lambda *args: None)
    calls = []
    measure_all = lengths._measure_all
    monkeypatch.setattr(lengths, "_measure_all", lambda *args: calls.append(args) or measure_all(*args))
    path = write(tmp_path / "train.json", [record(number, "w" * number) for number in range(3)])
    once = dataset(path, tokenizer).lengths().tokens.tolist()
    assert dataset(path, tokenizer, repeat=3).lengths().tokens.tolist() == 3 * once
    assert len(calls) == 2


def dataset(path, tokenizer, **options):
    return ChatmlDataset(path, options.pop("template", None), tokenizer, MGenVLImageProcessor(56), **options)


texts = st.text(max_size=30) | st.sampled_from(["<img></img>", "a <img>b</img>", "<img>", "<|im_end|>", "é\u0301"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(texts, texts), max_size=3), st.integers(0, 3), st.sampled_from([60, 90, 2048]), st.booleans())
def test_the_counter_is_the_length_of_the_example(tokenizer, turns, n_images, max_length, other):
    template = OTHER if other else None

    def outcome(call):
        try:
            return call()
        except UserError as error:
            return str(error)

    expected = outcome(
        lambda: len(encode_example(tokenizer, turns, n_images, template=template, max_length=max_length)["labels"])
    )
    counter = LengthCounter(tokenizer, template, max_length)
    assert outcome(lambda: counter(turns, n_images)) == expected
    assert outcome(lambda: counter(turns, n_images)) == expected


def test_lengths_are_those_of_the_samples(tokenizer, tmp_path):
    image = image_base64(1)
    records = [
        record(0, image=image),
        record(1, "only text"),
        record(2, image=[image, image]),
        record(3, "x" * 500, image=image),
        record(4, 'a quote: "image": "' + "A" * 80 + '"', image=image),
        '{"id": "5", "image": "' + image + '", "conversations": [["what?", "image first"]]}',
        record(6, image=image).replace(image[:8], image[:8].replace("/", "\\/")),
    ]
    data = dataset(write(tmp_path / "train.json", records), tokenizer, max_length=300)
    found = data.lengths()
    assert found.tokens.tolist() == [len(data.sample(number)["input_ids"]) for number in range(7)]
    assert found.tokens[3] == 300
    assert found.has_image.tolist() == [True, False] + [True] * 5


def test_several_files_with_templates_of_their_own(tokenizer, tmp_path):
    first = dataset(write(tmp_path / "a.json", [record(0), record(1, "longer")]), tokenizer)
    second = dataset(write(tmp_path / "b.json", [record(2)]), tokenizer, template=OTHER)
    first.extend(second)
    assert first.lengths().tokens.tolist() == [len(first.sample(number)["input_ids"]) for number in range(3)]


def test_broken_records_have_no_length_and_are_said(tokenizer, tmp_path, caplog):
    path = write(tmp_path / "train.json", [record(0), '{"id": 1, "conversations": "?"},', record(2, image=7)])
    data = dataset(path, tokenizer)
    assert (data.lengths().tokens == 0).tolist() == [False, True, True]
    assert "2 of 3 records" in caplog.text and data.n_skipped == 0


def test_lengths_are_counted_once(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "train.json", [record(number) for number in range(5)])
    before = dataset(path, tokenizer).lengths()
    counted = []

    def count(measure, count, name):
        counted.append(name)
        return np.full(count, 2 * 17, dtype="<u4")

    monkeypatch.setattr(lengths, "_measure_all", count)
    again = dataset(path, tokenizer).lengths()
    assert again.digest() == before.digest() and not counted
    # What they depend on has changed, or the file is not whole.
    dataset(path, tokenizer, max_length=40).lengths()
    dataset(path, tokenizer, max_length=40, template=OTHER).lengths()
    os.utime(path, ns=(1, 1))
    dataset(path, tokenizer, max_length=40, template=OTHER).lengths()
    with open(lengths.lengths_path(path), "r+b") as file:
        file.truncate(70)
    dataset(path, tokenizer, max_length=40, template=OTHER).lengths()
    # Of a version that counted tags otherwise.
    with open(lengths.lengths_path(path), "r+b") as file:
        file.write(b"MGENLEN1")
    dataset(path, tokenizer, max_length=40, template=OTHER).lengths()
    assert len(counted) == 5


def test_a_folder_that_takes_no_file(tokenizer, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    path = write(tmp_path / "train.json", [record(0)])

    def refuse(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(lengths, "atomic_write", refuse)
    assert dataset(path, tokenizer).lengths().tokens[0] > 0
    assert "kept in memory only" in caplog.text


def test_many_records_are_counted_by_several_processes(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "train.json", [record(number, "x" * (number % 7)) for number in range(50)])
    alone = dataset(path, tokenizer).lengths()
    os.unlink(lengths.lengths_path(path))
    monkeypatch.setattr(lengths, "_MANY_RECORDS", 10)
    monkeypatch.setattr(lengths, "_CHUNK", 8)
    monkeypatch.setattr(lengths, "physical_cores", lambda: 2)
    assert dataset(path, tokenizer).lengths().digest() == alone.digest()


def test_of_several_processes_one_counts(tmp_path):
    """Those of a run on one machine begin at once; the lengths are counted once."""
    path = write(tmp_path / "train.json", [record(number) for number in range(3)])
    context = multiprocessing.get_context("fork")
    together, counted, found = context.Barrier(2), context.Value("i", 0), context.Queue()

    def measure(row):
        with counted.get_lock():
            counted.value += 1
        time.sleep(0.05)
        return row + 1, True

    def process():
        together.wait()
        found.put(lengths.cached_lengths(path, bytes(32), 3, measure)[0].tolist())

    processes = [context.Process(target=process) for _ in range(2)]
    for one in processes:
        one.start()
    results = [found.get(timeout=60) for _ in processes]
    for one in processes:
        one.join()
    assert results == [[1, 2, 3]] * 2 and counted.value == 3
