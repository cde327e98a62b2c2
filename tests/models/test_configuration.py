"""config.json: what is read, what is refused, what is written back."""

import json

import pytest

from paddlemix.checkpoint.structure import LANGUAGE_KEYS
from paddlemix.models.mgen_vl.config_values import plain_config
from paddlemix.models.mgen_vl.configuration import MGenConfig
from paddlemix.utils.errors import ConfigError
from tests.helpers import tiny_config


def test_defaults_are_the_7b():
    config = MGenConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (4096, 32, 151936)
    assert (config.visual["width"], config.visual["layers"], config.n_queries) == (1664, 48, 256)
    assert config.image_start_id == 151857 and config.model_type == "mgen"


def test_read_without_paddle_it_has_the_same_values_and_refusals(tmp_path):
    for values in ({"visual": {}}, tiny_config().to_dict()):
        (tmp_path / "config.json").write_text(json.dumps(values))
        plain, config = plain_config(str(tmp_path)), MGenConfig.from_pretrained(str(tmp_path))
        for key in (*LANGUAGE_KEYS, "visual", "max_position_embeddings", "use_long_sequence_strategies"):
            assert getattr(plain, key) == getattr(config, key), key
    for values in ({}, {"visual": 1}, {"visual": {}, "hidden_size": -1}, {"visual": {"heads": 7}}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        messages = []
        for read in (plain_config, MGenConfig.from_pretrained):
            with pytest.raises(ConfigError) as error:
                read(str(tmp_path))
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_round_trip(tmp_path):
    tiny_config().save_pretrained(str(tmp_path))
    again = MGenConfig.from_pretrained(str(tmp_path), dtype="float32", use_flash_attention=True)
    assert again.visual == tiny_config().visual and again.seq_length == 512
    assert again.dtype == "float32" and again.use_flash_attention is True


@pytest.mark.parametrize("model_type", ["mgen", "qwen", None])
def test_accepted_model_types(tmp_path, model_type):
    values = {"visual": {}}
    if model_type:
        values["model_type"] = model_type
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert MGenConfig.from_pretrained(str(tmp_path)).model_type == "mgen"


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no config.json"),
        ("{", "is not JSON"),
        ("[" * 100000, "is not JSON"),
        ("[]", "JSON object"),
        ('{"model_type": "llama", "visual": {}}', "model_type is 'llama'"),
        ('{"model_type": "qwen"}', "no visual part"),
        ('{"visual": {}, "a": %s}' % ("9" * 5000), "more than 20 digits"),
        ('{"visual": {}, "a": "%s"}' % ("a" * (4 << 20)), "larger than 4 MB"),
        # PaddleNLP sets every key as an attribute.
        ('{"visual": {}, "to_dict": 1}', "'to_dict' is not a configuration key"),
        ('{"visual": {}, "self": 1}', "'self' is not a configuration key"),
        ('{"visual": {}, "__class__": 1}', "'__class__' is not a configuration key"),
        ('{"visual": {}, "no_bias": true, "no_bias": false}', "the key no_bias is in it twice"),
        ('{"visual": {}, "quantization_config": "os.system"}', "quantization_config must be an object or null"),
        ('{"visual": {}, "quantization_config": [1]}', "quantization_config must be an object or null"),
        ('{"visual": {}, "quantization_config": {"act_quant_method": "abs_mar"}}', "config.json: 'abs_mar'"),
        ('{"visual": {}, "problem_type": "a\\nb"}', r"problem_type. was not understood: received a\\nb"),
    ],
)
def test_hostile_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        MGenConfig.from_pretrained(str(tmp_path))


def test_no_quantization_may_be_said_by_null(tmp_path):
    (tmp_path / "config.json").write_text('{"visual": {}, "quantization_config": null}')
    MGenConfig.from_pretrained(str(tmp_path)).to_dict()


def test_the_cards_of_the_run_that_wrote_it_are_forgotten(tmp_path):
    (tmp_path / "config.json").write_text('{"visual": {}, "tensor_parallel_degree": 8, "sequence_parallel": true}')
    config = MGenConfig.from_pretrained(str(tmp_path))
    assert config.tensor_parallel_degree <= 1 and not getattr(config, "sequence_parallel", False)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_size": -1}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"hidden_size": 256}, "kv_channels × num_attention_heads"),
        ({"rotary_pct": 0.5}, "rotary_pct"),
        ({"intermediate_size": 255}, "even"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"visual": {"output_dim": 256}}, "output_dim must be hidden_size"),
        ({"visual": {"heads": 3}}, "multiple of visual.heads"),
        ({"visual": {"image_size": 57}}, "multiple of patch_size"),
        ({"visual": {"n_queries": 5}}, "square"),
        ({"visual": {"mlp_ratio": 0}}, "mlp_ratio"),
        ({"visual": {"image_start_id": 479}}, "in the vocabulary"),
        ({"visual": {"image_size": 2.5}}, "image_size"),
        ({"rotary_emb_base": [1]}, "rotary_emb_base"),
        ({"seq_length": 1}, "seq_length"),
        ({"dtype": "complex64"}, "dtype must be"),
        ({"use_long_sequence_strategies": True}, "use_long_sequence_strategies"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon"),
        ({"use_logn_attn": "false"}, "use_logn_attn must be true or false"),
        ({"use_dynamic_ntk": None}, "use_dynamic_ntk must be true or false"),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**values)


def test_visual_of_another_kind():
    with pytest.raises(ConfigError, match="must be an object"):
        MGenConfig(visual=[])
