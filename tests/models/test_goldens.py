"""The model against the public reference's numbers, where they are beside the project.

Tolerances are the contract's: 1e-4 on features and logits, 1e-3 relative on loss and gradient norms, equal tokens.
"""

import json
import re

import numpy as np
import pytest

ARRAYS = ("paddle_weights", "visual", "forward", "loss", "generate", "ntk", "lora")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def arrays(shared):
    folder = shared / "goldens" / "tiny_model"
    return {name: dict(np.load(folder / f"{name}.npz")) for name in ARRAYS}


def build(shared, arrays, **overrides):
    from paddlemix.models.mgen_vl.configuration import MGenConfig
    from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel

    meta = json.loads((shared / "goldens" / "tiny_model" / "meta.json").read_text())
    model = MGenLMHeadModel.build_lazily(MGenConfig(**dict(meta["config"], **overrides)))
    for name, tensor in model.state_dict().items():
        tensor.set_value(arrays["paddle_weights"][name])
    model.eval()
    return model


@pytest.fixture(scope="module")
def model(shared, arrays):
    return build(shared, arrays)


@pytest.fixture(scope="module")
def pixels(arrays):
    import paddle

    return paddle.to_tensor(arrays["visual"]["pixel_values"])


def ids(array):
    import paddle

    return paddle.to_tensor(array)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_position_table_is_the_reference_constant(arrays):
    from paddlemix.models.mgen_vl.connector import sincos_positions

    np.testing.assert_allclose(
        sincos_positions(256, 16), arrays["paddle_weights"]["visual.attn_pool.pos_embed"], atol=2e-6
    )


def test_visual_features(model, arrays, pixels):
    close(model.visual(pixels).numpy(), arrays["visual"]["visual_features"])


def test_visual_intermediates(model, arrays, pixels):
    from paddlemix.models.mgen_vl.connector import resize_positions

    vit, golden = model.visual.vit, arrays["visual"]
    patches = vit.conv1(pixels).flatten(2).transpose([0, 2, 1])
    close(patches.numpy(), golden["dbg_patch_embed"])
    close(resize_positions(vit.positional_embedding, 64).numpy(), golden["dbg_abs_pos"])
    out = vit(pixels)
    close(out.numpy(), golden["dbg_vit_out"])
    close(model.visual.attn_pool(out).numpy()[:1, ::4], golden["dbg_attn_pool"])


def test_logits_of_one_image(model, arrays, pixels):
    golden = arrays["forward"]
    close(model(ids(golden["one_ids"]), images=pixels[:1]).logits.numpy(), golden["one_logits"])


def test_logits_of_two_images(model, arrays, pixels):
    golden = arrays["forward"]
    logits = model(ids(golden["two_ids"]), images=pixels).logits.numpy()
    close(logits[:, golden["two_pos"]], golden["two_logits"])


def test_logits_of_text(model, arrays):
    golden = arrays["forward"]
    close(model(ids(golden["text_ids"])).logits.numpy(), golden["text_logits"])


def test_logits_of_a_padded_batch(model, arrays, pixels):
    golden = arrays["forward"]
    logits = model(
        ids(golden["batch_ids"]), images=pixels[1:2], attention_mask=ids(golden["batch_mask"])
    ).logits.numpy()
    close(logits[0][golden["batch_pos0"]], golden["batch_logits0"])
    close(logits[1][golden["batch_pos1"]], golden["batch_logits1"])


def test_loss_and_gradients(shared, arrays, pixels):
    model = build(shared, arrays)
    model.train()
    golden = arrays["loss"]
    loss = model(ids(golden["ids"]), images=pixels[1:2], labels=ids(golden["labels"])).loss
    assert float(loss) == pytest.approx(float(golden["loss"]), rel=1e-3)
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    close(gradients["lm_head.weight"].T[:8], golden["grad_lm_head_rows0_8"])
    close(gradients["visual.vit.conv1.weight"][:4], golden["grad_conv1_slice"])
    close(gradients["transformer.llm.h.0.attn.c_attn.bias"], golden["grad_c_attn0_bias"])
    close(gradients["visual.attn_pool.query"][:4], golden["grad_query_rows0_4"])

    public = json.loads((shared / "goldens" / "hf_to_paddle.json").read_text())
    norms = json.loads((shared / "goldens" / "tiny_model" / "grad_norms_hf.json").read_text())
    checked = 0
    for name, norm in norms.items():
        layer = re.search(r"\.(\d+)\.", name)
        key = name if name in public else re.sub(r"(h|resblocks)\.\d+\.", r"\1.{layer}.", name)
        ours = public[key]["paddle"].replace("{layer}", layer.group(1) if layer else "")
        if ours == "visual.attn_pool.pos_embed":
            assert ours not in gradients  # a constant here
            continue
        assert float(np.linalg.norm(gradients[ours])) == pytest.approx(norm, rel=1e-3), name
        checked += 1
    assert checked == len(gradients)


def test_greedy_tokens(model, arrays, pixels):
    golden = arrays["generate"]
    new, _ = model.generate(ids(golden["ids"]), images=pixels[:1], max_new_tokens=12, eos_token_id=399)
    assert new.numpy()[0].tolist() == golden["tokens"].tolist()


def test_step_logits_through_the_cache(model, arrays, pixels):
    golden = arrays["generate"]
    output = model(ids(golden["ids"]), images=pixels[:1], use_cache=True, last_logits_only=True)
    for token, expected in zip(golden["tokens"], golden["step_logits"]):
        assert output.logits.shape == [1, 1, 400]
        close(output.logits.numpy()[0, 0], expected)
        output = model(
            ids(np.array([[token]])), past_key_values=output.past_key_values, use_cache=True, last_logits_only=True
        )


def test_beyond_the_trained_length(shared, arrays, pixels):
    model = build(shared, arrays, seq_length=128)
    golden = arrays["ntk"]
    logits = model(ids(golden["text_ids"])).logits.numpy()
    close(logits[:, golden["text_pos"]], golden["text_logits"])
    logits = model(ids(golden["one_ids"]), images=pixels[:1]).logits.numpy()
    close(logits[:, golden["one_pos"]], golden["one_logits"])
    new, _ = model.generate(ids(golden["gen_ids"]), images=pixels[1:2], max_new_tokens=8, eos_token_id=399)
    assert new.numpy()[0].tolist() == golden["gen_tokens"].tolist()


def test_lora_logits(shared, arrays, pixels):
    from paddlenlp.peft import LoRAConfig, LoRAModel

    targets = [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"]
    golden = arrays["lora"]
    config = LoRAConfig(target_modules=targets, r=int(golden["r"]), lora_alpha=int(golden["alpha"]), lora_dropout=0.0)
    model = LoRAModel(build(shared, arrays), config)
    tensors = {name.replace("model.", "", 1): tensor for name, tensor in model.state_dict().items()}
    adapters = {key[2:]: value for key, value in golden.items() if key.startswith("W/")}
    assert adapters.keys() <= tensors.keys()
    for name, value in adapters.items():
        tensors[name].set_value(value)
    model.eval()
    logits = model(ids(arrays["forward"]["one_ids"]), images=pixels[:1]).logits.numpy()
    close(logits[:, -24:], golden["one_logits_tail"])


def test_public_names_and_shapes_of_7b(shared):
    from paddlemix.models.mgen_vl.configuration import MGenConfig
    from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel

    golden = json.loads((shared / "goldens" / "keys_7b.json").read_text())
    model = MGenLMHeadModel.build_lazily(MGenConfig(), "bfloat16")
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == golden
