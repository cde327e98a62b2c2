"""Slots: every option gives a row what it gets alone."""

import weakref

import numpy as np
import paddle
import pytest

from paddlemix.models.mgen_vl import engine as module
from paddlemix.models.mgen_vl import language
from paddlemix.models.mgen_vl.captioning import generate_captions
from paddlemix.models.mgen_vl.engine import NOT_FINITE, STUCK, Decoding, Engine, Prompt
from paddlemix.models.mgen_vl.generation import is_number
from paddlemix.models.mgen_vl.language import KVCache
from paddlemix.models.mgen_vl.slot_cache import SlotCache
from paddlemix.utils.errors import JobFailed
from tests.helpers import byte_vocab_tokenizer, make_tiny_model, prompt_ids, scripted

STOPS = (479, 5, 77, 100, 33, 250, 300, 310, 400, 20, 21, 22)


@pytest.fixture(scope="module")
def model():
    return make_tiny_model()


@pytest.fixture(scope="module")
def prompts():
    """Rows with none, one and two images, of 1 to 150 tokens."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(11):
        images = int(rng.integers(0, 3))
        text = rng.integers(1, 200, rng.integers(1, 9) if i != 4 else 140).tolist()
        pixels = rng.standard_normal((images, 3, 56, 56)).astype("float32")
        made.append(Prompt(prompt_ids(text, images=images) if images else text, pixels, key=i))
    return made


def decode(model, prompts, slots, stops=STOPS, **options):
    options.setdefault("max_new_tokens", 90)
    engine = Engine(model, Decoding(**options), stops, slots, scores=True, is_number=lambda ids: min(ids) >= 300)
    return engine, sorted(engine.run(prompts))


def naive(model, prompt, steps, change=lambda logits, ids: None):
    """Greedy, the whole forward for each token. change: what is done to the logits of the tokens so far."""
    ids = list(prompt.ids)
    images = paddle.to_tensor(prompt.images) if len(prompt.images) else None
    for _ in range(steps):
        logits = model(paddle.to_tensor([ids]), images=images).logits.numpy()[0, -1].astype("float64")
        change(logits, ids)
        ids.append(int(logits.argmax()))
    return ids[len(prompt.ids) :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sample": True, "temperature": 2.0, "seed": 3},
        {"sample": True, "top_k": 20, "top_p": 0.7, "temperature": 3.0},
        {"no_repeat_ngram_size": 3},
        {"repetition_penalty": 1.4, "min_new_tokens": 12},
        {"sample": True, "samples": 3, "temperature": 1.5, "repetition_penalty": 1.1, "no_repeat_ngram_size": 2},
        {"stop_repeating": 4},
    ],
)
def test_a_row_gets_what_it_gets_alone(model, prompts, options):
    alone = [found for prompt in prompts for found in decode(model, [prompt], 1, **options)[1]]
    for slots, order in ((1, 1), (3, -1), (5, 1), (16, -1)):
        _, found = decode(model, prompts[::order], slots, **options)
        by_key = {(prompts[::order][one.index].key, one.sample): one for one in found}
        assert len(found) == len(alone)
        for number, expected in enumerate(alone):
            got = by_key[divmod(number, options.get("samples", 1))]
            assert got[2:4] == expected[2:4] and got.note == expected.note
            assert got.score == pytest.approx(expected.score, rel=1e-4)
    assert len({tuple(one.ids) for one in alone}) > len(alone) // 2
    assert len({len(one.ids) for one in alone}) > 3


def test_greedy_equals_whole_forwards(model, prompts):
    """Past several lengths of the ring, which starts anew for each."""
    _, found = decode(model, prompts[:3], 2, stops=(), max_new_tokens=140)
    assert [one.ids for one in found] == [naive(model, prompt, 140) for prompt in prompts[:3]]
    assert all(one.stop is None for one in found)


def test_options_equal_their_definitions(model, prompts):
    def penalty(logits, ids):
        for i in set(ids):
            logits[i] = logits[i] * 1.4 if logits[i] < 0 else logits[i] / 1.4

    def no_bigram(logits, ids):
        logits[[ids[at + 1] for at in range(len(ids) - 1) if ids[at] == ids[-1]]] = -np.inf

    def no_stop(logits, ids):
        logits[list(STOPS)] = -np.inf

    for options, change in (
        ({"repetition_penalty": 1.4, "stops": ()}, penalty),
        ({"no_repeat_ngram_size": 2, "stops": ()}, no_bigram),
        ({"min_new_tokens": 25}, no_stop),
    ):
        _, found = decode(model, prompts[:4], 3, max_new_tokens=25, **options)
        assert [one.ids for one in found] == [naive(model, prompt, 25, change) for prompt in prompts[:4]]


def test_samples_follow_the_distribution(model, prompts):
    """4000 first tokens against the softmax of their logits, cut to top_k and top_p."""
    prompt = prompts[0]
    images = paddle.to_tensor(prompt.images) if len(prompt.images) else None
    logits = model(paddle.to_tensor([list(prompt.ids)]), images=images).logits.numpy()[0, -1].astype("float64")
    for options in ({"top_k": 4, "temperature": 0.7}, {"top_p": 0.5, "temperature": 0.8}):
        wanted = np.exp((logits - logits.max()) / options["temperature"])
        order = np.argsort(-wanted)
        if "top_k" in options:
            wanted[order[4:]] = 0
        else:
            shares = wanted[order] / wanted.sum()
            wanted[order[(shares.cumsum() - shares) >= 0.5]] = 0
        wanted /= wanted.sum()
        _, found = decode(model, [prompt], 8, (), max_new_tokens=1, sample=True, samples=4000, **options)
        counts = np.bincount([one.ids[0] for one in found], minlength=len(wanted))
        assert counts[wanted == 0].sum() == 0
        assert np.abs(counts / 4000 - wanted).max() < 4 * np.sqrt(0.25 / 4000)
        assert (counts > 0).sum() > 2


def test_several_samples_share_one_prefill(model, prompts, monkeypatch):
    seen = []
    forward = type(model.visual).forward
    monkeypatch.setattr(type(model.visual), "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    with_image = [prompt for prompt in prompts if len(prompt.images) == 1]
    _, found = decode(model, with_image, 4, sample=True, samples=4, temperature=2.0)
    assert sum(seen) == len(with_image) and len(found) == 4 * len(with_image)


def test_free_slots_are_filled_at_once(model, prompts):
    engine, found = decode(model, prompts * 4, 4)
    assert engine.waited > 50
    assert engine.filled >= 0.95 * 4 * engine.waited
    assert engine.busy == sum(len(one.ids) - 1 + (one.stop is not None) for one in found)


def test_the_host_waits_once_a_step(model, prompts, monkeypatch):
    waits = []
    numpy = paddle.Tensor.numpy
    engine = Engine(model, Decoding(max_new_tokens=30, sample=True, repetition_penalty=1.1), (), 4)
    monkeypatch.setattr(paddle.Tensor, "numpy", lambda self: waits.append(1) or numpy(self))
    list(engine.run(Prompt(prompt.ids) for prompt in prompts if not len(prompt.images)))
    prefills = len(waits) - engine.steps
    # One of a prefill is for the places of its images.
    assert engine.steps >= 29 and prefills <= 4


def test_nothing_is_copied_from_the_host_between_the_vit_and_the_first_tokens(model, prompts, monkeypatch):
    """A copy to a GPU waits for what was launched before it."""
    events = []
    numpy, to_tensor, visual = paddle.Tensor.numpy, paddle.to_tensor, model.visual.forward
    monkeypatch.setattr(paddle.Tensor, "numpy", lambda self: events.append("read") or numpy(self))
    monkeypatch.setattr(paddle, "to_tensor", lambda *args, **how: events.append("copy") or to_tensor(*args, **how))
    monkeypatch.setattr(model.visual, "forward", lambda images: events.append("ViT") or visual(images))
    language.frequencies.cache_clear()
    decode(model, [prompt for prompt in prompts if len(prompt.images)] * 2, 4)
    behind = [events[at + 1 : at + 2] for at, event in enumerate(events) if event == "ViT"]
    assert len(behind) > 1 and behind[1:] == [["read"]] * (len(behind) - 1)


def test_the_ring_grows_and_shrinks(model, prompts, monkeypatch):
    widths = []
    lay_out = SlotCache._lay_out
    monkeypatch.setattr(SlotCache, "_lay_out", lambda self, columns: widths.append(columns) or lay_out(self, columns))
    monkeypatch.setattr(SlotCache, "BLOCK", 16)
    _, found = decode(model, prompts, 2)
    assert any(after < before for before, after in zip(widths, widths[1:])) and max(widths) >= 160
    monkeypatch.undo()
    assert [one[:4] for one in found] == [one[:4] for one in decode(model, prompts, 2)[1]]


def test_memory_that_runs_out_halves_the_slots_and_loses_no_row(model, prompts, monkeypatch):
    expected = decode(model, prompts, 1, sample=True, samples=2, temperature=2.0)[1]
    through = type(model.transformer.llm).through
    failed = []

    def limited(self, embeds, *rest):
        # A step of more than three rows, at some depth.
        if embeds.shape[1] == 1 and embeds.shape[0] > 3 and len(failed) < 2 and rest[3].cursor % 7 == 3:
            failed.append(embeds.shape[0])
            raise MemoryError
        return through(self, embeds, *rest)

    monkeypatch.setattr(type(model.transformer.llm), "through", limited)
    engine, found = decode(model, prompts, 12, sample=True, samples=2, temperature=2.0)
    assert failed == [12, 6] and engine.slots == 3
    assert [one[:4] for one in found] == [one[:4] for one in expected]


def test_memory_that_runs_out_while_a_row_takes_its_slot_loses_none(model, prompts, monkeypatch):
    expected = decode(model, prompts, 1)[1]
    put, calls = SlotCache.put, []

    def limited(self, *given):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError
        return put(self, *given)

    monkeypatch.setattr(SlotCache, "put", limited)
    engine, found = decode(model, prompts, 4)
    assert engine.slots == 2 and [one[:4] for one in found] == [one[:4] for one in expected]


def test_the_last_rows_are_halved_from_their_own_number(model, prompts, monkeypatch):
    """Not from the slots, most of which are free by then."""
    through = type(model.transformer.llm).through
    sizes = []

    def limited(self, embeds, *rest):
        sizes.append(embeds.shape[0])
        if embeds.shape[1] == 1 and embeds.shape[0] > 1:
            raise MemoryError
        return through(self, embeds, *rest)

    monkeypatch.setattr(type(model.transformer.llm), "through", limited)
    engine, found = decode(model, prompts[:2], 12, max_new_tokens=5)
    assert sizes.count(2) == 2 and engine.slots == 1 and len(found) == 2


def test_what_a_failed_attempt_held_is_free_before_the_cards_cache_is_emptied(model, prompts, monkeypatch):
    """A pretended card."""
    caches, alive = [], []
    begin, through = SlotCache.__init__, type(model.transformer.llm).through

    def limited(self, embeds, *rest):
        if embeds.shape[1] == 1 and embeds.shape[0] > 2:
            raise MemoryError
        return through(self, embeds, *rest)

    def remembered(self, slots):
        caches.append(weakref.ref(self))
        begin(self, slots)

    monkeypatch.setattr(SlotCache, "__init__", remembered)
    monkeypatch.setattr(type(model.transformer.llm), "through", limited)
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.device.cuda, "empty_cache", lambda: alive.append([one() is not None for one in caches]))
    decode(model, prompts[:4], 4, max_new_tokens=3)
    assert alive == [[False, True]]


@pytest.mark.parametrize("options", [{}, {"sample": True}, {"sample": True, "top_k": 5, "top_p": 0.9}])
def test_logits_that_are_no_numbers_end_their_row_alone(model, prompts, monkeypatch, options):
    expected = decode(model, prompts[:4], 1, **options)[1]
    take = paddle.take_along_axis

    def checked(values, indices, axis):
        # On a GPU, an index outside ends the process.
        assert int(indices.min()) >= 0
        return take(values, indices, axis)

    monkeypatch.setattr(paddle, "take_along_axis", checked)
    plain, calls = type(model)._logits, []

    def broken(self, hidden):
        logits = plain(self, hidden)
        calls.append(1)
        if len(calls) == 4:
            logits[1] = float("nan")
        return logits

    monkeypatch.setattr(type(model), "_logits", broken)
    _, found = decode(model, prompts[:4], 4, **options)
    assert [one.note for one in found].count(NOT_FINITE) == 1
    for got, wanted in zip(found, expected):
        if got.note == NOT_FINITE:
            assert got.ids == wanted.ids[: len(got.ids)]
        else:
            assert got[:4] == wanted[:4]


def test_cycles_end_an_answer_and_numbers_are_none():
    def cycle(tokens):
        return module._cycle(tokens, 4, lambda ids: min(ids) >= 300)

    assert cycle([1, 2, 3, 9, 9, 9, 9]) == 1 and cycle([9, 9, 9]) == 0
    assert cycle([1] + [5, 6, 7] * 4) == 3 and cycle([5, 6, 7] * 4 + [5]) == 3
    assert cycle(list(range(16)) * 4) == 16 and cycle(list(range(17)) * 4) == 0
    # Four eights in a price; a telephone number; but no number goes on for ever.
    assert cycle([1, 308, 308, 308, 308]) == 0
    assert cycle([301, 308] * 6) == 0
    assert cycle([301, 308] * 13) == 2
    assert all(map(is_number, ("8.8", "400-", "8折", "99元", "￥9 ")))
    assert not any(map(is_number, ("！！", "8人", "元")))


def test_a_stuck_row_ends_with_its_cycle_once(model, prompts, monkeypatch):
    said = [7, 8, *[30, 31, 32] * 10]
    # The more often it repeats itself, the surer it is.
    step = scripted(model, monkeypatch, said)
    _, found = decode(model, prompts[:1], 1, stop_repeating=4)
    assert found[0].ids == [7, 8, 30, 31, 32] and found[0].note == STUCK and len(step) == 14
    # The score is that of the tokens which are kept.
    chance = [at - np.log(np.exp(at) + model.config.vocab_size - 1) for at in range(9, 14)]
    assert found[0].score == pytest.approx(np.mean(chance), rel=1e-4)
    step.clear()
    assert decode(model, prompts[:1], 1, max_new_tokens=20)[1][0].ids == said[:20]


def test_a_shortest_answer_does_not_end_with_the_templates_text_either(model, prompts):
    free = decode(model, prompts[:1], 1, stops=())[1][0].ids
    engine = Engine(model, Decoding(max_new_tokens=20, min_new_tokens=9), (), 1, ending=free[3:5])
    ids = next(engine.run(prompts[:1])).ids
    assert len(ids) >= 9 and ids[:4] == free[:4] and ids[4] != free[4]
    engine = Engine(model, Decoding(max_new_tokens=20, min_new_tokens=3), (), 1, ending=free[3:5])
    assert next(engine.run(prompts[:1])).ids == free[:3]


def test_memory_that_runs_out_halves_the_prompts_of_a_beam_search(model, prompts, monkeypatch):
    decoding = Decoding(max_new_tokens=5, num_beams=2, samples=2)
    expected = [one for prompt in prompts[:7] for one in model.beams([prompt], decoding, STOPS, 1)]
    through, rows = type(model.transformer.llm).through, []

    def limited(self, embeds, *rest):
        rows.append(embeds.shape[0])
        if embeds.shape[0] > most:
            raise MemoryError
        return through(self, embeds, *rest)

    monkeypatch.setattr(type(model.transformer.llm), "through", limited)
    most = 4
    found = list(model.beams(prompts[:7], decoding, STOPS, 6))
    assert [one for one in rows if one > 4] == [12, 6] and [one.index for one in found[::2]] == list(range(7))
    assert [one[1:4] for one in found] == [one[1:4] for one in expected]
    most = 1
    with pytest.raises(JobFailed, match="out of memory with one row at a time"):
        list(model.beams(prompts[:2], decoding, STOPS, 2))


def test_beams_that_have_ended_are_not_broken_by_other_rows(model, prompts, monkeypatch):
    """PaddleNLP lets the beams of a row that is done follow those of the first row."""
    plain, reordered, steps = type(model)._logits, KVCache.reordered, []

    def logits(self, hidden):
        made = plain(self, hidden)
        made[:2, :, 7] = -99.0
        made[2:, :, 7] = 99.0
        return made

    def broken(self, rows):
        steps.append(1)
        if len(steps) == 4:
            self.values[0][:2] = float("nan")
        return reordered(self, rows)

    monkeypatch.setattr(type(model), "_logits", logits)
    monkeypatch.setattr(KVCache, "reordered", broken)
    found = list(model.beams(prompts[:2], Decoding(max_new_tokens=8, num_beams=2), [7], 2))
    assert len(steps) == 7 and [one.note for one in found] == [NOT_FINITE, None] and found[1][2:4] == ([], 7)


def test_beams_are_the_same_alone_and_together(model, prompts, tmp_path):
    tokenizer = byte_vocab_tokenizer(str(tmp_path))
    decoding = Decoding(max_new_tokens=12, num_beams=3, samples=2)

    def said(prompts, slots):
        return {number: [one.text for one in texts] for number, texts in
                generate_captions(model, tokenizer, prompts, decoding, slots)}  # fmt: skip

    together = said(prompts[:5], 12)
    assert [together[i] for i in range(5)] == [said([prompt], 1)[0] for prompt in prompts[:5]]
    assert all(len(texts) == 2 for texts in together.values())


def test_beyond_the_trained_length(prompts):
    """NTK and log-n factors are a row's own, whatever the length of its neighbours."""
    model = make_tiny_model()
    model.config.seq_length = 60
    alone = [decode(model, [prompt], 1)[1][0].ids for prompt in prompts[:7]]
    assert [one.ids for one in decode(model, prompts[:7], 4)[1]] == alone
    model.config.seq_length = 2048
    assert decode(model, [prompts[4]], 1)[1][0].ids != alone[4]
