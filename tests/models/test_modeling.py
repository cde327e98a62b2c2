"""The joined model: spans, loss, weights in and out."""

import json

import numpy as np
import paddle
import pytest

from paddlemix.checkpoint import open_weights
from paddlemix.models.mgen_vl.language import KVCache
from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel
from paddlemix.processors.mgen_vl_processing import image_positions, label_positions
from paddlemix.utils.errors import UserError, WeightsError
from tests.helpers import IMAGE_START_ID, make_tiny_model, prompt_ids, save_tiny_model


@pytest.fixture(scope="module")
def model():
    return make_tiny_model()


def pixels(n, seed=0):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal((n, 3, 56, 56)).astype("float32"))


def batch(*rows):
    return paddle.to_tensor(np.array(rows))


def test_visual_gives_a_feature_per_query(model):
    assert model.visual(pixels(3)).shape == [3, 4, 128]
    with pytest.raises(ValueError, match=r"\[N, 3, 56, 56\]"):
        model.visual(paddle.zeros([1, 3, 64, 64]))


def test_logits_of_the_last_position_alone_equal_those_of_all(model, monkeypatch):
    ids, mask = batch(prompt_ids([1, 2, 3]), [0, 0, *prompt_ids([4])]), paddle.ones([2, 9], "int64")
    mask[1, :2] = 0
    given = dict(images=pixels(2), attention_mask=mask)
    whole, caches = model(ids, **given).logits.numpy(), [KVCache(), KVCache()]
    model(ids, **given, past_key_values=caches[0])
    rows, mlp = [], type(model.transformer.llm.h[0].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: rows.append(x.shape[1]) or forward(self, x))
    last = model(ids, **given, past_key_values=caches[1], last_logits_only=True).logits.numpy()
    assert rows == [9, 1], "the last layer computes the last token"
    np.testing.assert_allclose(last, whole[:, -1:], atol=1e-5)
    for buffers in zip(caches[0].keys + caches[0].values, caches[1].keys + caches[1].values):
        np.testing.assert_allclose(*(buffer.numpy() for buffer in buffers), atol=1e-6)


def test_images_fill_their_spans_in_row_major_order(model):
    ids = batch(prompt_ids([1, 2, 3, 4, 5, 6]), prompt_ids([], images=2))
    embeds = model.embed(ids, pixels(3)).numpy()
    features = model.visual(pixels(3)).numpy()
    for row, start, image in ((0, 1, 0), (1, 1, 1), (1, 7, 2)):
        np.testing.assert_allclose(embeds[row, start : start + 4], features[image], atol=1e-6)
    words = model.transformer.llm.wte(ids).numpy()
    np.testing.assert_array_equal(embeds[0, 5:], words[0, 5:])
    np.testing.assert_array_equal(embeds[:, 0], words[:, 0])


def test_precomputed_features_stand_for_images(model):
    ids = batch(prompt_ids([1, 2, 3]))
    ours = model(ids, image_features=model.visual(pixels(1))).logits
    np.testing.assert_array_equal(ours.numpy(), model(ids, images=pixels(1)).logits.numpy())


@pytest.mark.parametrize(
    "ids, images, message",
    [
        (prompt_ids([1, 2]), 0, "1 image spans, but 0 images"),
        (prompt_ids([1, 2]), 2, "1 image spans, but 2 images"),
        ([1, 2, 3], 1, "0 image spans, but 1 images"),
        (prompt_ids([1, 2], n_queries=3), 1, "4 ids and </img>"),
        (prompt_ids([1, 2])[:4], 1, "4 ids and </img>"),
        (prompt_ids([1, IMAGE_START_ID + 1]), 1, "without its <img>"),
        ([1, IMAGE_START_ID + 1], 0, "without its <img>"),
    ],
)
def test_spans_and_images_must_match(model, ids, images, message):
    with pytest.raises(UserError, match=message):
        model(batch(ids), images=pixels(images) if images else None)


def naive_loss(model, ids, labels, images):
    logits = model(ids, images=images).logits.numpy().astype("float64")
    total, count = 0.0, 0
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            label = int(labels[row, t + 1])
            if label != -100:
                z = logits[row, t]
                total += np.log(np.exp(z - z.max()).sum()) + z.max() - z[label]
                count += 1
    return total / count


def test_loss_is_the_mean_over_labelled_positions(model):
    rng = np.random.default_rng(0)
    ids = batch(prompt_ids(rng.integers(0, 256, 10)), prompt_ids(rng.integers(0, 256, 10)))
    labels = ids.numpy().copy()
    labels[:, :9] = -100
    labels[1, 9:14] = -100
    images = pixels(2)
    output = model(ids, images=images, labels=paddle.to_tensor(labels))
    assert float(output.loss) == pytest.approx(naive_loss(model, ids, labels, images), rel=1e-5)
    np.testing.assert_allclose(output.logits.numpy(), model(ids, images=images).logits.numpy(), atol=1e-6)


def test_places_given_spare_the_host_a_wait(model, monkeypatch):
    """With the collator's positions nothing is read back, and loss and gradients are those without."""
    rows = [prompt_ids([1, 2, 3, 4, 5, 6]), prompt_ids([], images=2)]
    ids, labels = np.array(rows), np.array(rows)
    labels[:, :9] = -100
    places = {
        "image_positions": paddle.to_tensor(image_positions(ids, 3, IMAGE_START_ID, 4)),
        "label_positions": paddle.to_tensor(label_positions(labels)),
    }
    inputs = {"images": pixels(3), "labels": batch(*labels), "attention_mask": paddle.ones([2, 12], "int64")}

    def run(**more):
        loss = model(batch(*rows), **inputs, **more).loss
        loss.backward()
        gradients = [p.grad.numpy() for p in model.parameters() if p.grad is not None]
        model.clear_gradients()
        return [loss.numpy(), *gradients]

    expected = run()

    to_tensor = paddle.to_tensor

    def waits(*args, **kwargs):
        raise AssertionError("the host waited")

    with monkeypatch.context() as patch:
        patch.setattr(paddle, "nonzero", waits)
        for name in ("numpy", "item", "tolist", "__bool__", "__float__", "__int__"):
            patch.setattr(paddle.Tensor, name, waits)
        rows = batch(*rows)
        visual = model.visual.forward

        def launched(images):
            # From here on, copying from the host waits for the ViT.
            patch.setattr(paddle, "to_tensor", waits)
            return visual(images)

        patch.setattr(model.visual, "forward", launched)
        for packed in ({}, {"sample_lengths": [[12], [12]]}):
            patch.setattr(paddle, "to_tensor", to_tensor)
            loss = model(rows, **inputs, **places, **packed).loss
            loss.backward()
            model.clear_gradients()
        patch.setattr(paddle, "to_tensor", to_tensor)
        with pytest.raises(AssertionError, match="waited"):
            model(rows, **inputs)
    rows = rows.numpy()
    for one, other in zip(run(**places), expected):
        np.testing.assert_array_equal(one, other)


def test_logits_beside_a_loss_cost_nothing_until_read(model, monkeypatch):
    seen = []
    plain = MGenLMHeadModel._logits
    monkeypatch.setattr(MGenLMHeadModel, "_logits", lambda self, h: seen.append(list(h.shape)) or plain(self, h))
    ids = batch(prompt_ids([1, 2, 3, 4]))
    labels = ids.numpy().copy()
    labels[:, :-2] = -100
    output = model(ids, images=pixels(1), labels=paddle.to_tensor(labels))
    assert seen == [[2, 128]]
    assert output.logits.shape == [1, 10, 480] and output.logits is output.logits


def test_no_label_at_all_is_loss_zero_with_a_gradient_path(model):
    ids = batch([1, 2, 3])
    loss = model(ids, labels=paddle.full_like(ids, -100)).loss
    assert float(loss) == 0.0


def test_tuples(model):
    ids = batch([1, 2, 3])
    loss, logits = model(ids, labels=ids, return_dict=False)
    assert loss.shape == [] and logits.shape == [1, 3, 480]
    (logits,) = model(ids, return_dict=False)
    assert logits.shape == [1, 3, 480]


def test_changing_the_image_changes_loss_and_its_gradient_reaches_the_vit():
    model = make_tiny_model()
    model.train()
    ids = batch(prompt_ids([1, 2, 3, 4]))
    losses = [float(model(ids, images=pixels(1, seed), labels=ids).loss) for seed in (0, 1)]
    assert abs(losses[0] - losses[1]) > 1e-4
    model(ids, images=pixels(1), labels=ids).loss.backward()
    assert float(model.visual.vit.conv1.weight.grad.abs().max()) > 0


def test_frozen_vision_builds_no_graph():
    model = make_tiny_model()
    for parameter in model.visual.parameters():
        parameter.stop_gradient = True
    assert model.visual(pixels(1)).stop_gradient
    model.visual.attn_pool.query.stop_gradient = False
    assert not model.visual(pixels(1)).stop_gradient
    assert model.visual.vit(pixels(1)).stop_gradient


def test_padding_changes_nothing(model):
    short, long = prompt_ids([5, 6]), prompt_ids([1, 2, 3, 4, 5, 6])
    pad = len(long) - len(short)
    images = pixels(2)
    alone = model(batch(short), images=images[:1]).logits.numpy()[0]
    for side in ("left", "right"):
        padded = [0] * pad + short if side == "left" else short + [0] * pad
        mask = [0] * pad + [1] * len(short) if side == "left" else [1] * len(short) + [0] * pad
        together = model(
            batch(padded, long), images=images, attention_mask=batch(mask, [1] * len(long))
        ).logits.numpy()[0]
        real = together[pad:] if side == "left" else together[: len(short)]
        np.testing.assert_allclose(real, alone, atol=1e-5)


@pytest.mark.parametrize("format", ["pdparams", "safetensors"])
@pytest.mark.parametrize("shard", ["10GB", "200KB"])
def test_save_and_load(tmp_path, model, format, shard):
    model.save_pretrained(str(tmp_path), max_shard_size=shard, format=format)
    indexes = list(tmp_path.glob("*.index.json"))
    assert len(indexes) == (0 if shard == "10GB" else 1)
    again = MGenLMHeadModel.from_pretrained(str(tmp_path))
    assert not again.training
    # The weights are in memory of their own: what happens to the file is nothing to the model.
    for path in tmp_path.glob(f"model*.{format}"):
        path.write_bytes(b"")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), tensor.numpy())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mgen"


def test_dtype_is_converted_on_the_way(tmp_path, model):
    from paddlemix.checkpoint import convert_dtype, open_weights, write_sharded

    model.save_pretrained(str(tmp_path))
    half = {}
    with open_weights(str(tmp_path)) as reader:
        for key in reader.keys():
            half[key] = np.array(reader.read(key, "bfloat16"))
    (tmp_path / "model_state.pdparams").unlink()
    items = [(key, "bfloat16", array.shape, lambda a=array: a) for key, array in half.items()]
    write_sharded(str(tmp_path), items, format="safetensors")
    again = MGenLMHeadModel.from_pretrained(str(tmp_path), dtype="float32")
    for name, tensor in model.state_dict().items():
        expected = convert_dtype(convert_dtype(tensor.numpy(), "float32", "bfloat16"), "bfloat16", "float32")
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), expected)


def test_keys_that_do_not_fit_are_listed(tmp_path, model):
    from paddlemix.checkpoint import write_sharded

    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    model.save_pretrained(str(tmp_path))
    del tensors["lm_head.weight"]
    tensors["visual.extra"] = np.zeros(2, "float32")
    tensors["visual.proj"] = np.zeros([3, 4], "float32")
    items = [(name, "float32", array.shape, lambda a=array: a) for name, array in tensors.items()]
    write_sharded(str(tmp_path), items)
    with pytest.raises(WeightsError) as error:
        MGenLMHeadModel.from_pretrained(str(tmp_path))
    text = str(error.value)
    assert "1 missing: lm_head.weight" in text and "1 unexpected: visual.extra" in text
    assert "visual.proj is [3, 4], not [128, 128]" in text


def test_loading_initialises_nothing(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path)
    monkeypatch.setattr(MGenLMHeadModel, "_init_language", lambda self: pytest.fail("random weights were made"))
    MGenLMHeadModel.from_pretrained(folder)


def test_pos_embed_never_trains():
    model = make_tiny_model()
    before = model.visual.attn_pool.pos_embed.numpy().copy()
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters())
    ids = batch(prompt_ids([1, 2, 3, 4]))
    model(ids, images=pixels(1), labels=ids).loss.backward()
    optimizer.step()
    np.testing.assert_array_equal(model.visual.attn_pool.pos_embed.numpy(), before)


def test_loading_says_what_was_read(tmp_path, monkeypatch, capsys):
    from paddlemix.models.mgen_vl import modeling
    from paddlemix.utils import progress

    make_tiny_model(seed=0).save_pretrained(str(tmp_path), max_shard_size="200KB")
    monkeypatch.setattr(modeling, "_BAR_BYTES", 1)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    model = MGenLMHeadModel.from_pretrained(str(tmp_path), dtype="float32")
    count, files = len(model.state_dict()), len(list(tmp_path.glob("*.pdparams")))
    assert files > 1
    size = sum(tensor.numel().item() * 4 for tensor in model.state_dict().values()) / 1e9
    said = capsys.readouterr().err
    assert f"weights: {count} of {count} tensors, {files} files, {size:,.3g} GB, float32, " in said
    assert "loading: 100%" in said
    with open_weights(str(tmp_path)) as reader:
        model.to(dtype="bfloat16")
        model.fill(reader, {"lm_head.weight"})
    said = capsys.readouterr().err
    assert f"weights: 1 of {count} tensors, 1 file, " in said and "float32 → bfloat16" in said
