"""A packed row gives the loss, gradients and logits of its samples one by one."""

import numpy as np
import paddle
import pytest

from paddlemix.datasets.collator import MGenVLCollator
from paddlemix.models.lora import apply_lora
from paddlemix.models.mgen_vl.attention import attend, attend_within
from paddlemix.processors.mgen_vl_processing import encode_example
from paddlemix.utils.compat import FUSED_ATTENTION_ON_CPU
from tests.helpers import byte_vocab_tokenizer, make_tiny_model

FLASH = pytest.param(
    "flash",
    marks=pytest.mark.skipif(not FUSED_ATTENTION_ON_CPU, reason="this Paddle has no fused attention on the CPU"),
)

# (captions of the turns, images): text alone, one image, two images, two turns.
SAMPLES = [(["a red square"], 1), (["no picture at all"], 0), (["two"], 2), (["one", "more"], 1), (["x"], 0)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    tokenizer = byte_vocab_tokenizer(str(tmp_path_factory.mktemp("vocabulary")))
    rng = np.random.default_rng(0)
    found = []
    for captions, images in SAMPLES:
        sample = encode_example(tokenizer, [["what is it?", caption] for caption in captions], images)
        found.append(dict(sample, images=rng.standard_normal((images, 3, 56, 56)).astype(np.float32)))
    return found


def collate(rows):
    return {name: paddle.to_tensor(array) for name, array in MGenVLCollator(256)(rows).items()}


def in_packs(samples):
    """Two rows of unequal length, so that one is padded."""
    return [[samples[2], samples[1], samples[0]], [samples[3], samples[4]]]


def loss_and_gradients(model, batch):
    model.clear_gradients()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, samples):
    alone = loss_and_gradients(model, collate([samples[i] for i in (2, 1, 0, 3, 4)]))
    packed = loss_and_gradients(model, collate(in_packs(samples)))
    assert packed[0] == pytest.approx(alone[0], abs=1e-5)
    assert set(packed[1]) == set(alone[1]) and alone[1]
    for name, gradient in alone[1].items():
        assert np.abs(packed[1][name] - gradient).max() < 1e-5, name
    return alone


@pytest.mark.parametrize("mode", ["eager", FLASH, "recompute"])
def test_full_tuning(samples, mode):
    model = make_tiny_model(use_flash_attention=mode == "flash")
    model.train()
    model.transformer.llm.enable_recompute = mode == "recompute"
    loss, gradients = assert_equal(model, samples)
    # Every part takes part, images too.
    for name in ("visual.attn_pool.query", "transformer.llm.wte.weight", "transformer.llm.h.0.attn.c_attn.weight"):
        assert np.abs(gradients[name]).max() > 1e-3, name


def test_lora(samples):
    model = make_tiny_model()
    model = apply_lora(model, rank=4, alpha=8, dropout=0.0, target_modules=[".*attn.c_attn.*", ".*mlp.w1.*"])
    rng = np.random.default_rng(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.set_value(rng.standard_normal(parameter.shape).astype(np.float32) * 0.05)
    model.train()
    _, gradients = assert_equal(model, samples)
    assert all("lora_" in name for name in gradients)


def test_loss_is_the_mean_over_all_labels_of_the_batch(samples):
    model = make_tiny_model()
    weighed, labels = 0.0, 0
    for sample in samples:
        count = int((sample["labels"][1:] != -100).sum())
        weighed, labels = weighed + model(**collate([sample])).loss.item() * count, labels + count
    assert model(**collate(in_packs(samples))).loss.item() == pytest.approx(weighed / labels, abs=1e-5)


def test_samples_of_a_row_do_not_see_each_other(samples):
    model = make_tiny_model()
    logits = model(**collate([[samples[0], samples[1], samples[3]]])).logits.numpy()[0]
    begin = 0
    for sample in (samples[0], samples[1], samples[3]):
        length = len(sample["input_ids"])
        alone = model(**collate([sample])).logits.numpy()[0, :length]
        np.testing.assert_allclose(logits[begin : begin + length], alone, atol=1e-5)
        begin += length


def test_log_n_scaling_restarts_and_ntk_beyond_its_row_is_refused(samples):
    # Together longer than seq_length, alone not: neither scaling may begin.
    lengths = [len(sample["input_ids"]) for sample in samples]
    model = make_tiny_model(seq_length=max(lengths))
    rows = collate([samples])
    assert rows["input_ids"].shape[1] > max(lengths)
    packed = model(**rows).logits.numpy()[0, : lengths[0]]
    np.testing.assert_allclose(packed, model(**collate(samples[:1])).logits.numpy()[0, : lengths[0]], atol=1e-5)
    short = make_tiny_model(seq_length=max(lengths) - 1)
    with pytest.raises(ValueError, match="per row"):
        short(**rows)
    short.train()
    assert short(**rows).loss.item() > 0


def test_wrong_lengths_and_a_cache_are_refused(samples):
    model, rows = make_tiny_model(), collate([samples])
    with pytest.raises(ValueError, match="no cache"):
        model(**rows, use_cache=True)
    rows["sample_lengths"] = rows["sample_lengths"] * 2
    with pytest.raises(ValueError, match="more than"):
        model(**rows)


def test_attend_within_is_attend_with_a_block_diagonal_mask():
    paddle.seed(0)
    query, key, value = (paddle.randn([2, 2, 7, 4]) for _ in range(3))
    segments, bias = [[(3, None), (4, None)], [(5, None)]], np.full((2, 1, 7, 7), -1e30, dtype=np.float32)
    for row, parts in enumerate(segments):
        begin = 0
        for length, _ in parts:
            bias[row, :, begin : begin + length, begin : begin + length] = 0
            begin += length
    within = attend_within(query, key, value, segments).numpy()
    masked = attend(query, key, value, paddle.to_tensor(bias)).numpy()
    np.testing.assert_allclose(within[0], masked[0], atol=1e-6)
    np.testing.assert_allclose(within[1, :5], masked[1, :5], atol=1e-6)
    assert (within[1, 5:] == 0).all()
