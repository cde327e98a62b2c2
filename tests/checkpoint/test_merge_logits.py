"""A merged model gives the adapter's own logits."""

import json

import numpy as np
import pytest

from paddlemix.checkpoint import write_pdparams
from paddlemix.checkpoint.convert import convert_qwen_vl
from paddlemix.checkpoint.lora_merge import merge
from paddlemix.models.mgen_vl.parameters import parameter_shapes
from tests.helpers import prompt_ids, save_tiny_model

TARGETS = [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"]


def logits(model, ids, images):
    import paddle

    with paddle.no_grad():
        return model(input_ids=paddle.to_tensor([ids]), images=paddle.to_tensor(images)).logits.numpy()


@pytest.mark.parametrize("format", ["pdparams", "safetensors"])
def test_merged_equals_adapted(tmp_path, format):
    import paddle

    from paddlemix.auto import AutoModelMIX
    from paddlemix.models.lora import apply_lora, load_lora

    base = save_tiny_model(tmp_path / "base")
    model = AutoModelMIX.from_pretrained(base, dtype="float32")
    whole = "visual.attn_pool.query"
    lora = apply_lora(model, rank=4, alpha=16, target_modules=TARGETS, trainable=[whole])
    paddle.seed(3)
    for tensor in lora.model.state_dict().values():
        if not tensor.stop_gradient:
            tensor.set_value(0.05 * paddle.randn(tensor.shape))
    lora.save_pretrained(str(tmp_path / "lora"))

    merge(base, str(tmp_path / "lora"), str(tmp_path / "out"), format=format, progress=False)
    merged = AutoModelMIX.from_pretrained(str(tmp_path / "out"), dtype="float32")
    adapted = load_lora(AutoModelMIX.from_pretrained(base, dtype="float32"), str(tmp_path / "lora"))
    plain = AutoModelMIX.from_pretrained(base, dtype="float32")

    ids = prompt_ids(range(40, 60))
    images = np.random.default_rng(0).standard_normal((1, 3, 56, 56)).astype(np.float32)
    ours, theirs = logits(merged, ids, images), logits(adapted, ids, images)
    assert np.abs(ours - theirs).max() < 1e-4 < 1e-2 < np.abs(ours - logits(plain, ids, images)).max()


def test_golden_adapters(shared, tmp_path):
    """The reference's adapters on the reference's weights, imported, merged, and run."""
    from paddlemix.auto import AutoModelMIX

    golden = shared / "goldens" / "tiny_model"
    stored = np.load(golden / "lora.npz")
    named = {key[2:]: ("float32", stored[key]) for key in stored.files if key.startswith("W/")}
    (tmp_path / "lora").mkdir()
    write_pdparams(str(tmp_path / "lora/lora_model_state.pdparams"), named)
    (tmp_path / "lora/lora_config.json").write_text(
        json.dumps({"r": int(stored["r"]), "lora_alpha": int(stored["alpha"]), "target_modules": TARGETS})
    )
    base = str(tmp_path / "base")
    convert_qwen_vl(str(golden / "hf_checkpoint"), base, dtype="float32", shapes_of=parameter_shapes, progress=False)
    merge(str(tmp_path / "base"), str(tmp_path / "lora"), str(tmp_path / "out"), progress=False)
    model = AutoModelMIX.from_pretrained(str(tmp_path / "out"), dtype="float32")
    one = np.load(golden / "forward.npz")
    pixels = np.load(golden / "visual.npz")["pixel_values"][:1]
    ours = logits(model, one["one_ids"].reshape(-1).tolist(), pixels)[:, -24:]
    assert np.abs(ours - stored["one_logits_tail"]).max() < 1e-4
