"""Which parameters train: patterns, their counts, and the table that is printed."""

import pytest

from paddlemix.models.lora import adapter_shapes
from paddlemix.trainer import freeze
from paddlemix.utils.errors import ConfigError
from tests.helpers import refused, tiny_config

TARGETS = [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"]
NAMES = [
    "visual.proj",
    "visual.conv1.weight",
    "visual.ln_post.weight",
    "visual.attn_pool.query",
    "visual.attn_pool.pos_embed",
    "transformer.llm.wte.weight",
    "transformer.llm.h.0.attn.c_attn.weight",
    "transformer.llm.ln_f.weight",
    "lm_head.weight",
]


@pytest.fixture(scope="module")
def shapes_7b():
    from paddlemix.models.mgen_vl.configuration import MGenConfig
    from paddlemix.models.mgen_vl.parameters import parameter_shapes

    return parameter_shapes(MGenConfig())


def counts(shapes, trainable, adapters=()):
    trainable = set(trainable)
    parameters = [(name, shape, name in trainable) for name, shape in shapes.items()]
    return freeze.count_groups(parameters + [(name, shape, True) for name, shape in dict(adapters).items()])


def test_counts_of_the_notebooks_lora_run(shapes_7b):
    trainable = freeze.plan_freeze(list(shapes_7b), ["*visual*"], ["*visual.attn_pool*"], lora=True)
    adapters = adapter_shapes(shapes_7b, TARGETS, 64)
    assert len(adapters) == 2 * 128 and not any(name.startswith("visual") for name in adapters)
    found = counts(shapes_7b, trainable, adapters)
    assert found["lora"] == (0, 112_197_632)
    assert found["attn_pool"] == (76_054_528 - 75_005_952, 75_005_952)
    assert found["vit"] == (1_842_770_688, 0)
    assert found["ln_post and proj"] == (16_785_408, 0)
    assert sum(one.trainable for one in found.values()) == 187_203_584
    assert sum(sum(one) for name, one in found.items() if name != "lora") == 9_656_935_168


def test_summary_has_the_notebooks_form(shapes_7b):
    trainable = freeze.plan_freeze(list(shapes_7b), ["*visual*"], lora=True)
    line = freeze.summary_line(counts(shapes_7b, trainable, adapter_shapes(shapes_7b, TARGETS, 64)))
    assert line == (
        "Frozen parameters: 9.66e+09 || Trainable parameters:1.12e+08 || Total parameters:9.77e+09|| Trainable:1.15%"
    )


def test_table_names_every_group_in_the_order_of_the_data(shapes_7b):
    trainable = freeze.plan_freeze(list(shapes_7b), ["*visual*"])
    lines = freeze.table_lines(counts(shapes_7b, trainable))
    assert [line[:16].strip() for line in lines] == [
        "module group",
        "vit",
        "attn_pool",
        "ln_post and proj",
        "llm embeddings",
        "llm layers",
        "lm_head",
        "all",
    ]
    assert lines[-1].split()[1:] == ["9,656,935,168", "7,721,324,544"]


def test_full_tuning_with_patterns():
    trainable = freeze.plan_freeze(NAMES, ["*visual*"], ["*visual.attn_pool*"])
    assert trainable == [NAMES[3], *NAMES[5:]]


def test_a_range_of_layers(shapes_7b):
    names = list(shapes_7b)
    trainable = freeze.plan_freeze(names, ["*"], ["transformer.llm.h.{16..31}.*", "visual.attn_pool.*"])
    layers = {int(name.split(".")[3]) for name in trainable if name.startswith("transformer.llm.h.")}
    assert layers == set(range(16, 32))
    found = counts(shapes_7b, trainable)
    # Half of the layers: c_attn, c_proj, three matrices of the MLP and two norms each.
    assert found["llm layers"].trainable == 16 * (4 * 4096**2 + 3 * 4096 * 11008 + 3 * 4096 + 2 * 4096)
    assert found["attn_pool"].trainable == 75_005_952 and found["lm_head"].trainable == 0
    assert freeze.plan_freeze(names, ["*"], ["*.h.{0..0}.attn.c_attn.bias"]) == [
        "transformer.llm.h.0.attn.c_attn.bias"
    ]
    two = freeze.plan_freeze(names, ["*"], ["visual.vit.transformer.resblocks.{1..2}{0..1}.ln_1.bias"])
    assert [int(name.split(".")[4]) for name in two] == [10, 11, 20, 21]


def test_a_range_beyond_the_layers_is_an_error(shapes_7b):
    names = list(shapes_7b)
    with refused(ConfigError, "freeze_exclude", match=r'"\*.h.32.\*" .of "\*.h.{16..40}.\*".'):
        freeze.plan_freeze(names, ["*"], ["*.h.{16..40}.*"])
    # Each pattern is a problem once, not once per number.
    with pytest.raises(ConfigError) as caught:
        freeze.plan_freeze(names, ["*"], ["*.h.{32..9999}.*", "*.h.40.*"])
    assert str(caught.value).count("matches no parameter") == 2
    with refused(ConfigError, "freeze_exclude", match=r"{31..16}"):
        freeze.plan_freeze(names, ["*"], ["*.h.{31..16}.*"])


def test_without_patterns_everything_but_the_constant_trains():
    trainable = freeze.plan_freeze(NAMES)
    assert set(NAMES) - set(trainable) == {"visual.attn_pool.pos_embed"}


def test_with_lora_only_what_is_excluded_from_the_freeze_trains_whole():
    assert freeze.plan_freeze(NAMES, lora=True) == []
    assert freeze.plan_freeze(NAMES, ["*visual*"], lora=True) == []
    assert freeze.plan_freeze(NAMES, ["*visual*"], ["*attn_pool*"], lora=True) == ["visual.attn_pool.query"]


def test_the_constant_never_trains():
    for lora in (False, True):
        trainable = freeze.plan_freeze(NAMES, ["*"], ["*pos_embed", "visual.proj"], lora=lora)
        assert trainable == ["visual.proj"]


def test_a_pattern_without_a_match_is_an_error():
    with refused(ConfigError, "freeze_include", match='"visual"'):
        freeze.plan_freeze(NAMES, ["visual"])
    with refused(ConfigError, "freeze_exclude", match='"[*]VISUAL[*]"'):
        freeze.plan_freeze(NAMES, ["*visual*"], ["*VISUAL*"])
    with refused(ConfigError, "freeze_include", "freeze_exclude", match='"a.*"b.*"d{2..1}"'):
        freeze.plan_freeze(NAMES, ["a*", "*visual*", "b*"], ["d{2..1}"])


def test_nothing_left_to_train_is_an_error():
    with refused(ConfigError, "freeze_include"):
        freeze.plan_freeze(NAMES, ["*"])


def test_apply_and_count_on_a_model():
    from paddlemix.models.mgen_vl.parameters import parameter_shapes
    from tests.helpers import make_tiny_model

    model = make_tiny_model()
    trainable = freeze.plan_freeze(list(model.state_dict()), ["*visual*"], ["*attn_pool*"])
    freeze.apply_freeze(model, trainable)
    found = freeze.count_groups((name, t.shape, not t.stop_gradient) for name, t in model.state_dict().items())
    assert found == counts(parameter_shapes(tiny_config()), trainable)
    assert model.visual.attn_pool.query.stop_gradient is False
    assert model.visual.attn_pool.pos_embed.stop_gradient is True
    assert model.visual.proj.stop_gradient is True
