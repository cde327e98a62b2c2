"""The captioner: rows read ahead, slots, and the order of answers."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from paddlemix.inference import captioner as module
from paddlemix.inference.captioner import (
    EMPTY_ANSWER,
    MAX_BATCH,
    Answer,
    Captioner,
    Sample,
    free_memory,
    rows_that_fit,
)
from paddlemix.models.mgen_vl import captioning
from paddlemix.models.mgen_vl.captioning import Candidate
from paddlemix.models.mgen_vl.engine import Prompt, is_out_of_memory, left_pad
from paddlemix.utils.errors import JobFailed, UserError
from tests.helpers import image_base64, make_tiny_model, tiny_config


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny model, its tokenizer and image processor."""
    from paddlemix.processors.images import MGenVLImageProcessor
    from tests.helpers import byte_vocab_tokenizer

    model = make_tiny_model(seed=3)
    tokenizer = byte_vocab_tokenizer(str(tmp_path_factory.mktemp("tokenizer")))
    return model, tokenizer, MGenVLImageProcessor.from_config(model.config)


@pytest.fixture(scope="module")
def images():
    return [image_base64(seed, size=(60 + seed, 50)) for seed in range(9)]


def ask(parts, images, threads=None, **options):
    options.setdefault("max_new_tokens", 12)
    captioner = Captioner(*parts, **options)
    captioner.workers = threads or captioner.workers
    answers = captioner.captions(images)
    return [Answer(answer.caption, answer.note) for answer in answers]


def test_captions_do_not_depend_on_batch_or_order(parts, images):
    alone = ask(parts, images, batch_size=1)
    assert all(answer.caption and answer.note is None for answer in alone)
    # The images decide: no two of these are told the same.
    assert len({answer.caption for answer in alone}) > len(images) // 2
    assert ask(parts, images, batch_size=4) == alone
    assert ask(parts, images, batch_size=32, threads=1) == alone
    assert ask(parts, images[::-1], batch_size=2) == alone[::-1]


def test_rows_without_an_image_keep_their_place(parts, images):
    good = ask(parts, images[:3], batch_size=2)
    mixed = [Answer(None, "missing column"), images[0], "not base64!", images[1], images[2], b"aGVsbG8="]
    answers = ask(parts, mixed, batch_size=2)
    assert [answers[1], answers[3], answers[4]] == good
    assert answers[0] == mixed[0]
    for bad in (answers[2], answers[5]):
        assert bad.caption is None and bad.note


def test_prompts_and_system_texts_change_the_answer(parts, images):
    plain = ask(parts, images)
    assert ask(parts, images, prompt="What is it?") != plain
    assert ask(parts, images, system="You sell cups.") != plain


def test_prompts_of_different_length_in_one_batch(parts, images):
    model, tokenizer, image_processor = parts
    captioner = Captioner(*parts, max_new_tokens=12, batch_size=4)
    prompts = []
    for i, prompt in enumerate(("short", "a much longer question than the other ones", "中等长度", "x")):
        sample = captioner._prepare(images[i])
        ids = Captioner(*parts, prompt=prompt, batch_size=1).prompt_ids
        prompts.append(Prompt(ids, sample.pixels[None]))

    def said(prompts):
        answers = captioning.generate_captions(model, tokenizer, prompts, captioner.decoding, 4)
        return {number: candidates[0].text for number, candidates in answers}

    assert len({len(prompt.ids) for prompt in prompts}) == 4
    together = said(prompts)
    assert [together[i] for i in range(4)] == [said([prompt])[0] for prompt in prompts]


def test_image_tags_in_a_prompt_are_text(parts, images):
    model, tokenizer, _ = parts
    for prompt in ("<img>x</img> what", "</img>", "<imgpad>", "<img>", "<|im_end|>"):
        captioner = Captioner(*parts, prompt=prompt, system=prompt, batch_size=1, max_new_tokens=4)
        ids = captioner.prompt_ids
        assert (ids.count(tokenizer.img_start_id), ids.count(tokenizer.img_end_id)) == (1, 1)
        assert ids.count(tokenizer.im_end_id) == 2
        assert tokenizer.decode(ids).count(prompt) == 2 + (prompt == "<|im_end|>") * 2 + (prompt in "<img></img>")
        assert next(captioner.captions(images[:1])).caption


def test_a_prompt_longer_than_the_models_positions_is_refused(parts):
    for options in ({"prompt": "x" * 600}, {"system": "x" * 600}):
        with pytest.raises(UserError, match=r"take 6\d\d tokens, and the model takes 512 at most"):
            Captioner(*parts, **options)


def answering(monkeypatch, answer):
    """Let captions be answer(number, pixels) of each prompt, two prompts at a time."""

    def fake(model, tokenizer, prompts, *options):
        numbered = enumerate(prompts)
        for pair in iter(lambda: list(itertools.islice(numbered, 2)), []):
            yield from [(number, [Candidate(answer(number, prompt.images[0]))]) for number, prompt in pair]

    monkeypatch.setattr(captioning, "generate_captions", fake)


def test_an_empty_answer_is_no_caption(parts, images, monkeypatch):
    answering(monkeypatch, lambda number, pixels: "")
    assert ask(parts, images[:3]) == [Answer(None, EMPTY_ANSWER)] * 3


def test_answers_out_of_order_come_in_order(parts, images, monkeypatch):
    def fake(model, tokenizer, prompts, *options):
        for number in reversed(range(len(list(prompts)))):
            yield number, [Candidate(str(number))]

    monkeypatch.setattr(captioning, "generate_captions", fake)
    answers = ask(parts, [images[0], Answer(None, "no image"), images[1], images[2], Answer(None, "no image")])
    assert [answer.caption for answer in answers] == ["0", None, "1", "2", None]


def test_a_decoder_bug_costs_one_row(parts, images, monkeypatch):
    model, tokenizer, image_processor = parts
    calls = iter([None, ZeroDivisionError("a bug"), MemoryError(), None])

    def broken(image):
        error = next(calls)
        if error:
            raise error
        return image_processor(image)

    answers = ask((model, tokenizer, broken), images[:4], threads=1)
    assert [answer.note for answer in answers] == [
        None, "decoder error (ZeroDivisionError)", "out of memory", None
    ]  # fmt: skip


def captioner_of_numbers(parts, prepare=lambda image: None, **options):
    """A Captioner whose images are numbers."""
    made = Captioner(*parts, **options)
    made._prepare = lambda image: prepare(image) or Sample([1], np.array(int(image)))
    return made


def test_rows_ahead_are_decoded_while_the_model_answers(parts, monkeypatch):
    monkeypatch.setattr(module, "WINDOW_ROWS", 3)
    decoded = set()
    overlapped = threading.Event()

    def answer(number, pixels):
        if number == 0:
            # Only another thread can decode 2 and 3 now.
            for _ in range(6000):
                if {2, 3} <= decoded:
                    overlapped.set()
                    break
                time.sleep(0.01)
        return str(pixels)

    answering(monkeypatch, answer)
    captioner = captioner_of_numbers(parts, decoded.add)
    answers = list(captioner.captions(_Sized(range(6))))
    assert overlapped.is_set()
    assert [answer.caption for answer in answers] == list("012345")


class _Sized(list):
    """Numbers that have a length, as images have."""

    def __iter__(self):
        return (_Number(i) for i in super().__iter__())


class _Number(int):
    def __len__(self):
        return 1


def test_answers_come_out_before_the_input_is_read_to_its_end(parts, monkeypatch):
    monkeypatch.setattr(module, "WINDOW_ROWS", 2)
    read = []

    def source():
        for i in range(100):
            read.append(i)
            yield _Number(i)

    answering(monkeypatch, lambda number, pixels: "x")
    next(captioner_of_numbers(parts).captions(source()))
    # Two prompts, and the one ahead.
    assert len(read) == 3


def test_rows_ahead_are_bounded_by_bytes(parts, monkeypatch):
    monkeypatch.setattr(module, "WINDOW_BYTES", 5)
    read = []

    def source():
        for image in ("aaaa", Answer(None, "x"), "bb", "c", "dddd"):
            read.append(image)
            yield image

    captioner = Captioner(*parts)
    captioner._prepare = lambda image: image
    with ThreadPoolExecutor(1) as pool:
        prepared = captioner._prepared(source(), pool)
        next(prepared)
        # With "bb" the five bytes are passed.
        assert read == ["aaaa", Answer(None, "x"), "bb"]
        assert list(prepared) == [Answer(None, "x"), "bb", "c", "dddd"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("ResourceExhaustedError: Out of memory error on GPU 0."),
        OSError("(External) CUDA error(2), out of memory."),
    ],
)
def test_out_of_memory_halves_the_batch_and_goes_on(parts, images, error):
    model, tokenizer, image_processor = parts
    sizes = []

    class Small:
        """The model on a card that holds three rows."""

        def __getattr__(self, name):
            return getattr(model, name)

        def __call__(self, ids, **kwargs):
            sizes.append(ids.shape[0])
            if ids.shape[0] > 3:
                raise error
            return model(ids, **kwargs)

    answers = ask((Small(), tokenizer, image_processor), images, batch_size=8)
    assert answers == ask(parts, images, batch_size=1)
    # Groups of four fail with eight slots and with four; what it learns stays.
    assert sizes == [4, 4, 2, 2, 2, 2, 1]


def test_out_of_memory_with_one_image_ends_the_job(parts, images):
    model, tokenizer, image_processor = parts

    class Broken:
        def __getattr__(self, name):
            return getattr(model, name)

        def __call__(self, *args, **kwargs):
            raise self.error

    broken = Broken()
    bug, fault = RuntimeError("a bug"), OSError("(External) CUDA error(700)")
    for raised, expected in ((MemoryError(), JobFailed), (bug, RuntimeError), (fault, OSError)):
        broken.error = raised
        with pytest.raises(expected):
            ask((broken, tokenizer, image_processor), images[:1], batch_size=1)


def test_is_out_of_memory():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("(ResourceExhausted) Out of memory error"))
    assert is_out_of_memory(OSError("(External) CUBLAS error(3). [Hint: 'CUBLAS_STATUS_ALLOC_FAILED'.]"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_left_pad():
    ids, mask = left_pad([[1, 2, 3], [4]], pad_id=9)
    np.testing.assert_array_equal(ids, [[1, 2, 3], [9, 9, 4]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 1]])
    assert ids.dtype == mask.dtype == np.int64


def test_rows_from_memory():
    config = tiny_config()

    def fit(free, dtype="float32", **options):
        return rows_that_fit(config, 100, 50, dtype, free, **options)

    # Keys and values of 2 layers, and one layer's again while they grow: 150 tokens, 128 wide, 4 bytes; and logits.
    row = 2 * 3 * 150 * 128 * 4 + 480 * 12
    alone = next(free for free in range(row, 1 << 30, 64) if fit(free))
    # Up to a group, each row is computed with the others; after that it takes its slot alone.
    assert [fit(n * alone) for n in (0, 1, 2, 4)] == [0, 1, 2, 4]
    assert [fit(4 * alone + n * row) for n in (0, 1, 7, 28)] == [4, 5, 11, 32]
    assert fit(4 * alone + 28 * row, sample=True) < 32 < fit(4 * alone + 28 * row, dtype="float16")


def test_rows_of_the_7b_on_a_32_gb_card():
    """The notebook's card: 19.3 GB of weights leave about 12 GB."""
    from paddlemix.models.mgen_vl.configuration import MGenConfig

    config = MGenConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        kv_channels=128,
        intermediate_size=22016,
    )
    # 2 × 33 layers × 800 tokens × 4096 × 2 bytes = 433 MB of cache a row; those of a group take more.
    assert 22 <= rows_that_fit(config, 288, 512, "float16", 12 * 10**9) <= 26
    # Fused attention holds no scores.
    assert 25 <= rows_that_fit(config, 288, 512, "float16", 12 * 10**9, fused=True) <= 27
    assert rows_that_fit(config, 288, 512, "float16", 60 * 10**9, fused=True) > MAX_BATCH


def test_the_batch_rule_knows_of_fused_attention(parts, monkeypatch):
    """A pretended card, with room for a few rows."""
    model = parts[0]
    rows = {}
    monkeypatch.setattr("paddlemix.inference.captioner.free_memory", lambda device: 4 << 20)
    for fused in (False, True):
        monkeypatch.setattr(model, "generates_fused", lambda fused=fused: fused)
        rows[fused] = Captioner(*parts, max_new_tokens=8).batch_size
    assert 1 < rows[False] < rows[True]


def test_free_memory_of_this_machine():
    assert 0 < free_memory("cpu") < 1 << 50


def test_free_memory_heeds_the_container(monkeypatch):
    import builtins
    import io

    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 1000000 kB\n",
        "/sys/fs/cgroup/memory.max": "600000000\n",
        "/sys/fs/cgroup/memory.current": "200000000\n",
    }

    def fake_open(path, *args):
        if path not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[path])

    monkeypatch.setattr(builtins, "open", fake_open)
    assert free_memory("cpu") == 200_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_memory("cpu") == 512_000_000


def test_free_memory_of_a_card(monkeypatch):
    import paddle

    card = SimpleNamespace(total_memory=32_000_000_000)
    asked = []
    monkeypatch.setattr(paddle.device.cuda, "get_device_properties", lambda n: asked.append(n) or card)
    monkeypatch.setattr(paddle.device.cuda, "memory_allocated", lambda n: 20_000_000_000)
    assert free_memory("gpu:1") == pytest.approx(10.8e9)
    assert asked == [1]
