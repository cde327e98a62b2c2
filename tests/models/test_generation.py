"""Decoding: equal to a plain loop, alone and in batches."""

import json

import numpy as np
import paddle
import pytest

from paddlemix.models.mgen_vl import attention, connector, generation, language, vision
from paddlemix.models.mgen_vl.configuration import MGenConfig
from paddlemix.models.mgen_vl.generation import (
    CaptionGeneration,
    TextStreamer,
    decode_response,
    generation_values,
    load_generation_config,
)
from paddlemix.processors.mgen_vl_processing import ChatTemplate
from paddlemix.utils.errors import ConfigError, UserError
from tests.helpers import byte_vocab_tokenizer, make_tiny_model, prompt_ids, scripted

# An id that no test wants to end on.
NEVER = 479


@pytest.fixture(scope="module")
def model():
    model = make_tiny_model()
    # The random model must not choose the end by chance: logit 0 is the middle of its range.
    weight = model.lm_head.weight.numpy()
    weight[:, NEVER] = 0
    model.lm_head.weight.set_value(weight)
    return model


def pixels(n, seed=0):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal((n, 3, 56, 56)).astype("float32"))


def batch(*rows):
    return paddle.to_tensor(np.array(rows))


def log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def naive_greedy(model, ids, images, steps):
    """Whole forward per token, no cache."""
    ids, new = list(ids), []
    for _ in range(steps):
        token = int(model(batch(ids), images=images).logits.numpy()[0, -1].argmax())
        ids.append(token)
        new.append(token)
    return new


def naive_beams(model, ids, images, steps, beams, stops=(), least=0):
    """Plain beam search: (score, tokens) of the best `beams` sequences by summed log-probability. A sequence ends after
    `steps` tokens or, after `least` tokens, with the probability of all stop ids."""
    kept, ended = [(0.0, [])], []
    for step in range(steps):
        longer = []
        for score, new in kept:
            scores = log_softmax(model(batch(list(ids) + new), images=images).logits.numpy()[0, -1].astype("float64"))
            if stops:
                end = np.log(np.exp(scores[list(stops)]).sum()) if step >= least else -1e9
                scores[list(stops)] = -1e9
                scores[stops[-1]] = end
            longer += [(score + scores[t], new + [int(t)]) for t in np.argsort(scores)[-2 * beams :]]
        longer = sorted(longer, reverse=True)[: 2 * beams]
        ended += [one for one in longer[:beams] if one[1][-1] in stops]
        ended = sorted(ended, reverse=True)[:beams]
        kept = [one for one in longer if one[1][-1] not in stops][:beams]
        if len(ended) == beams and ended[-1][0] >= longer[0][0]:
            return ended
    return sorted(ended + kept, reverse=True)[:beams]


PROMPTS = (prompt_ids([10, 20, 30]), prompt_ids([1, 2, 3, 4, 5, 6, 7], images=2), prompt_ids([9]))


def padded(rows):
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return batch(*ids), batch(*mask)


def test_greedy_equals_a_plain_loop(model):
    expected = naive_greedy(model, PROMPTS[0], pixels(1), 125)  # past one block of the cache
    new, scores = model.generate(batch(PROMPTS[0]), images=pixels(1), max_new_tokens=125, eos_token_id=NEVER)
    assert new.numpy()[0].tolist() == expected
    assert scores.shape == [1, 1]


@pytest.mark.parametrize("strategy", [{}, {"decode_strategy": "beam_search", "num_beams": 3}])
def test_a_batch_equals_its_rows_one_by_one(model, strategy):
    images = pixels(4)
    options = dict(max_new_tokens=10, eos_token_id=NEVER, **strategy)
    alone = [
        model.generate(batch(row), images=images[a:b], **options)[0].numpy()[0].tolist()
        for row, (a, b) in zip(PROMPTS, ((0, 1), (1, 3), (3, 4)))
    ]
    ids, mask = padded(PROMPTS)
    together, _ = model.generate(ids, images=images, attention_mask=mask, **options)
    assert together.numpy().tolist() == alone
    assert len({tuple(row) for row in alone}) == 3


def test_beam_search_equals_a_plain_one(model):
    for row, images in ((PROMPTS[0], pixels(1)), (PROMPTS[1], pixels(2, 7))):
        new, _ = model.generate(
            batch(row), images=images, max_new_tokens=6, eos_token_id=NEVER, decode_strategy="beam_search", num_beams=4
        )
        assert new.numpy()[0].tolist() == naive_beams(model, row, images, 6, 4)[0][1]


@pytest.mark.parametrize("least", [0, 3])
def test_beams_end_at_any_of_several_stop_ids(model, least):
    stops = [100, 11, 249, 300, 5, 177]
    expected = naive_beams(model, PROMPTS[0], pixels(1), 9, 3, stops, least)
    assert len({len(tokens) for _, tokens in expected}) > 1 and any(tokens[-1] == 177 for _, tokens in expected)
    new, scores = model.generate(
        batch(PROMPTS[0]), images=pixels(1), max_new_tokens=9, eos_token_id=stops, decode_strategy="beam_search",
        num_beams=3, num_return_sequences=3, min_new_tokens=least, length_penalty=0.0,
    )  # fmt: skip
    pad = model.config.pad_token_id
    assert [[t for t in row if t != pad] for row in new.numpy().tolist()] == [tokens for _, tokens in expected]
    np.testing.assert_allclose(scores.numpy().flatten(), [score for score, _ in expected], rtol=1e-4)


def test_a_row_stops_at_its_end_and_the_batch_when_all_have(model):
    images = pixels(4)
    ids, mask = padded(PROMPTS)
    free, _ = model.generate(ids, images=images, attention_mask=mask, max_new_tokens=12, eos_token_id=NEVER)
    free = free.numpy()
    ends = [int(free[0, 2]), int(free[1, 4]), int(free[2, 3])]
    new, _ = model.generate(ids, images=images, attention_mask=mask, max_new_tokens=12, eos_token_id=ends)
    new, pad = new.numpy(), model.config.pad_token_id
    lengths = [next(i for i, t in enumerate(row) if t in ends) + 1 for row in free.tolist()]
    assert new.shape[1] == max(lengths) < 12
    for row, expected, length in zip(new, free, lengths):
        assert row[:length].tolist() == expected[:length].tolist()
        assert set(row[length:].tolist()) <= {pad}


def test_sampling_is_seeded_and_narrow_sampling_is_greedy(model):
    def sample(seed, **options):
        paddle.seed(seed)
        new, _ = model.generate(
            batch(PROMPTS[0]),
            images=pixels(1),
            max_new_tokens=8,
            eos_token_id=NEVER,
            decode_strategy="sampling",
            **options,
        )
        return new.numpy()[0].tolist()

    greedy, _ = model.generate(batch(PROMPTS[0]), images=pixels(1), max_new_tokens=8, eos_token_id=NEVER)
    assert sample(0, top_k=1) == sample(0, top_p=0.0) == greedy.numpy()[0].tolist()
    assert sample(1, top_k=50, temperature=3.0) == sample(1, top_k=50, temperature=3.0)
    assert sample(1, top_k=50, temperature=3.0) != sample(2, top_k=50, temperature=3.0)
    rows, _ = model.generate(
        batch(PROMPTS[1]), images=pixels(2), max_new_tokens=3, eos_token_id=NEVER, decode_strategy="sampling",
        num_return_sequences=3, top_k=1,
    )  # fmt: skip
    assert rows.shape == [3, 3] and len({tuple(r) for r in rows.numpy().tolist()}) == 1


def test_the_image_matters_and_is_seen_once(model, monkeypatch):
    calls = []
    forward = type(model.visual).forward
    monkeypatch.setattr(type(model.visual), "forward", lambda self, x: calls.append(1) or forward(self, x))
    answers = {
        tuple(model.generate(batch(PROMPTS[0]), images=pixels(1, s), max_new_tokens=6)[0].numpy()[0]) for s in range(3)
    }
    assert len(calls) == 3 and len(answers) > 1


def test_ids_are_read_before_the_vit_is_launched(model, monkeypatch):
    """Reading them later would wait for the ViT; the steps after it wait only to see whether all rows have ended."""
    events = []
    read, see = paddle.Tensor.numpy, type(model.visual).forward
    monkeypatch.setattr(paddle.Tensor, "numpy", lambda self, *_: events.append(tuple(self.shape)) or read(self, *_))
    monkeypatch.setattr(type(model.visual), "forward", lambda self, x: events.append("ViT") or see(self, x))
    for strategy in ({}, {"decode_strategy": "sampling", "num_return_sequences": 2, "top_k": 1, "seed": 5}):
        events.clear()
        model.generate(batch(PROMPTS[1]), images=pixels(2), max_new_tokens=3, eos_token_id=NEVER, **strategy)
        rows = strategy.get("num_return_sequences", 1)
        # Ids; then, at each step, tokens with their logits and losses.
        assert events[:2] == [(1, len(PROMPTS[1])), "ViT"]
        assert events[2:] == [(rows, 3)] * 3


def test_lm_head_sees_the_last_position_only(model, monkeypatch):
    shapes = []
    plain = type(model)._logits
    monkeypatch.setattr(type(model), "_logits", lambda self, h: shapes.append(list(h.shape)) or plain(self, h))
    model.generate(batch(PROMPTS[0]), images=pixels(1), max_new_tokens=3, eos_token_id=NEVER)
    assert shapes == [[1, 1, 128]] * 3


@pytest.mark.parametrize("device, trained, works, fused", [
    ("cpu", False, True, False), ("cpu", True, False, True),
    ("gpu:0", False, True, True), ("gpu:0", True, False, False),
])  # fmt: skip
def test_generation_takes_fused_attention_where_the_card_has_it(model, monkeypatch, device, trained, works, fused):
    """A pretended card; float32 weights on one (training at O1) have no fused kernel whatever the key says."""
    asked, used = [], []
    monkeypatch.setattr(generation.paddle, "get_device", lambda: device)
    monkeypatch.setattr(generation, "resolve_flash", lambda *which: asked.append(which) or (works, None))
    plain = attention.attend

    def spy(query, *args, use_flash=False, **kwargs):
        used.append((use_flash, query.shape[2] == 1))
        return plain(query, *args, **kwargs)

    for module in (vision, connector, language):
        monkeypatch.setattr(module, "attend", spy)
    monkeypatch.setattr(model.config, "use_flash_attention", trained)
    monkeypatch.setattr(model.visual, "use_flash_attention", trained)
    model.generate(batch(PROMPTS[0]), images=pixels(1), max_new_tokens=2, eos_token_id=NEVER)
    # ViT, connector and prefill, whose last layer has one query unless the kernel is fused; not the one of a step.
    assert used == [(fused, False)] * 4 + [(fused, not fused)] + [(False, True)] * 2
    assert set(asked) == ({(True, "float32", "gpu:0")} if device == "gpu:0" else set())
    assert model.config.use_flash_attention is model.visual.use_flash_attention is trained


def test_a_shortest_answer_with_several_stop_ids(model):
    free = model.generate(batch(PROMPTS[0]), images=pixels(1), max_new_tokens=6, eos_token_id=NEVER)[0].numpy()[0]
    stop_ids = [int(free[0]), int(free[1]), NEVER]
    with_stops = dict(images=pixels(1), max_new_tokens=6, eos_token_id=stop_ids)
    assert model.generate(batch(PROMPTS[0]), **with_stops)[0].shape == [1, 1]
    longer = model.generate(batch(PROMPTS[0]), min_new_tokens=4, **with_stops)[0].numpy()[0]
    assert len(longer) >= 4 and not set(longer[:4].tolist()) & set(stop_ids)


def test_generation_leaves_the_training_mode_alone(model):
    model.train()
    try:
        model.generate(batch([1, 2]), max_new_tokens=1)
        assert model.training and model.visual.training
    finally:
        model.eval()


def test_wrong_image_count(model):
    with pytest.raises(UserError, match="1 image spans, but 2 images"):
        model.generate(batch(PROMPTS[0]), images=pixels(2), max_new_tokens=1)


def test_chat_over_several_turns(model, tmp_path):
    tokenizer = byte_vocab_tokenizer(str(tmp_path))
    query = tokenizer.from_list_format([{"image": "a"}, {"text": "what?"}])
    response, history = model.chat(tokenizer, query, None, images=pixels(1), max_new_tokens=5)
    assert history == [(query, response)]
    _, longer = model.chat(tokenizer, "and?", history, images=pixels(1), max_new_tokens=5)
    assert [turn[0] for turn in longer] == [query, "and?"]
    assert history == [(query, response)]  # the caller's list is its own
    with pytest.raises(UserError, match="1 image spans"):
        model.chat(tokenizer, "and?", history, images=None, max_new_tokens=5)


def test_an_answer_ends_with_the_templates_text(model, tmp_path, monkeypatch):
    tokenizer = byte_vocab_tokenizer(str(tmp_path))
    template = ChatTemplate.default()._replace(assistant=("A: ", "##\n"))
    steps = scripted(model, monkeypatch, list(b"ab##\nmore, never asked for") * 9)
    pieces = []
    streamer = TextStreamer(tokenizer, model.stop_ids(tokenizer, template), pieces.append, template.ending(tokenizer))
    response, _ = model.chat(tokenizer, "hi", template=template, max_new_tokens=60, streamer=streamer)
    assert response == "ab" == "".join(pieces) and len(steps) == 5


def test_logits_that_are_not_finite_are_said(model, tmp_path, monkeypatch, caplog):
    tokenizer = byte_vocab_tokenizer(str(tmp_path))
    plain = type(model)._logits
    monkeypatch.setattr(type(model), "_logits", lambda self, hidden: plain(self, hidden) * float("nan"))
    for options in ({}, {"decode_strategy": "beam_search", "num_beams": 2}):
        caplog.clear()
        with caplog.at_level("WARNING", logger="paddlemix"):
            model.chat(tokenizer, "hi", max_new_tokens=3, **options)
        assert "1 of 1 answers ended at logits that are not finite" in caplog.text


def test_beams_are_not_streamed(model):
    with pytest.raises(UserError, match="--stream does not go with beam search"):
        model.generate(batch([1, 2]), decode_strategy="beam_search", num_beams=2, streamer=object())


def test_images_of_forgotten_turns_are_left_out(model, tmp_path, monkeypatch):
    tokenizer = byte_vocab_tokenizer(str(tmp_path))
    monkeypatch.setattr(model.generation_config, "max_window_size", 70)
    first, second = (tokenizer.from_list_format([{"image": "a"}, {"text": "w" * n}]) for n in (50, 1))
    images = pixels(2)
    long, _ = model.chat(tokenizer, second, [(first, "x")], images=images, max_new_tokens=6)
    alone, _ = model.chat(tokenizer, second, [], images=images[1:], max_new_tokens=6)
    assert long == alone
    with pytest.raises(UserError, match="3 images"):
        model.chat(tokenizer, second, [], images=pixels(3), max_new_tokens=1)


def test_decode_response_ends_at_the_first_stop(tmp_path):
    tokenizer = byte_vocab_tokenizer(str(tmp_path))
    stops = [tokenizer.eod_id, tokenizer.im_end_id]
    ids = list("图 a ".encode()) + [tokenizer.im_end_id] + list(b"more")
    assert decode_response(tokenizer, ids, stops) == "图 a"
    assert decode_response(tokenizer, list(b"open"), stops) == "open"


def config_file(tmp_path, values):
    (tmp_path / "generation_config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return load_generation_config(str(tmp_path), MGenConfig())


def test_generation_config_defaults_to_greedy(tmp_path):
    public = {"do_sample": True, "top_k": 0, "top_p": 0.3, "max_new_tokens": 99, "transformers_version": "4.31.0"}
    made = config_file(tmp_path, public)
    assert (made.decode_strategy, made.max_new_tokens, made.eos_token_id) == ("greedy_search", 99, 151643)
    assert made.max_window_size == 6144
    assert config_file(tmp_path, {"decode_strategy": "beam_search", "num_beams": 3}).num_beams == 3
    assert load_generation_config(None, MGenConfig()).max_new_tokens == 512


def test_generation_config_survives_saving(tmp_path, model):
    changed = config_file(tmp_path, {"decode_strategy": "sampling", "top_k": 7, "top_p": 0.3, "max_window_size": 99})
    written = generation_values(changed)
    again = config_file(tmp_path, written)
    assert generation_values(again) == written
    assert (again.decode_strategy, again.top_k, again.top_p, again.max_window_size) == ("sampling", 7, 0.3, 99)
    assert not any(key.startswith("_") for key in written)


@pytest.mark.parametrize(
    "values, message",
    [
        ("{", "is not JSON"),
        ([], "JSON object"),
        ({"max_new_tokens": "many"}, "max_new_tokens must be from 1"),
        ({"max_new_tokens": 10**9}, "max_new_tokens"),
        ({"top_p": 2}, "top_p"),
        ({"decode_strategy": "magic"}, "decode_strategy is"),
        ({"chat_format": "raw"}, "chatml"),
    ],
)
def test_hostile_generation_config(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        config_file(tmp_path, values)


def streamed(tokenizer, ids, stop_ids):
    """The pieces that a TextStreamer writes of ids that come one by one."""
    pieces = []
    streamer = TextStreamer(tokenizer, stop_ids, pieces.append)
    for i in ids:
        streamer.put(paddle.to_tensor([[i]]))
    streamer.end()
    return pieces


def test_streamed_pieces_are_whole_characters_and_add_up(tmp_path):
    tokenizer = byte_vocab_tokenizer(str(tmp_path))
    stop = CaptionGeneration.stop_ids(tokenizer)
    # A token per byte: every character comes in two to four parts.
    text = " 一只é🙂猫 <ref>杯</ref>\n在这里 "
    ids = tokenizer.text_to_ids(text)
    pieces = streamed(tokenizer, ids + [tokenizer.im_end_id, 65], stop)
    assert "".join(pieces) == text.strip()
    assert len(pieces) > 8 and "\ufffd" not in "".join(pieces)
    chance = np.random.default_rng(0)
    span = tokenizer.image_span()
    for _ in range(200):
        # Any bytes, half of an image span, blanks at the end, special ids.
        choice = [*range(0, 256, 5), *tokenizer.text_to_ids("猫好 "), tokenizer.eod_id + 100, tokenizer.img_start_id]
        ids = chance.choice(choice, chance.integers(0, 12)).tolist()
        ids += chance.choice([0, 1]) * span[: chance.integers(len(span) + 1)] + [97, 32]
        pieces = streamed(tokenizer, ids, stop)
        assert "".join(pieces) == decode_response(tokenizer, ids, stop)


def test_streaming_changes_nothing_and_features_stand_for_images(tmp_path):
    model, tokenizer = make_tiny_model(seed=4), byte_vocab_tokenizer(str(tmp_path))
    images = pixels(2)
    history = [("Picture 1: <img></img>\nwhat?", "a cup")]
    query = "Picture 2: <img></img>\nand this?"
    pieces = []
    streamer = TextStreamer(tokenizer, model.stop_ids(tokenizer), pieces.append)
    plain, _ = model.chat(tokenizer, query, history=history, images=images, max_new_tokens=12)
    features = model.visual(images)
    told, _ = model.chat(
        tokenizer, query, history=history, image_features=features, max_new_tokens=12, streamer=streamer
    )
    assert told == plain == "".join(pieces)
    assert model.chat(tokenizer, query, history, images=images.flip(0), max_new_tokens=12)[0] != plain
