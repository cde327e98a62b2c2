"""The figures of docs/performance.md and docs/scale.md are those of the script."""


import pytest

from paddlemix.trainer import work
from tools import cost_7b


@pytest.fixture(scope="module")
def model():
    return cost_7b.Model()


@pytest.mark.parametrize(
    "document, build", [(document, build) for document, builds in cost_7b.TABLES.items() for build in builds]
)
def test_the_docs_hold_the_scripts_tables(model, root, document, build):
    text = (root / "docs" / f"{document}.md").read_text(encoding="utf-8")
    printed = "\n".join(build(model))
    assert printed in text, f"python tools/cost_7b.py {document} prints another table:\n{printed}"


def test_counts_are_those_of_the_matrices(model):
    assert model.parameters == 9_656_935_168 and model.adapters == 112_197_632
    assert model.cache_per_token() == 512 << 10
    # Two operations for each weight and token: all of the ViT's weights lie in matrices but a few.
    assert work.vit(model.config) == pytest.approx(2 * 1024 * 1.8427e9, rel=0.1)
    # Without the norms and c_attn's bias.
    assert model.decoder(1, 0) == 2 * (6_476_664_832 - 4096 - 32 * (2 * 4096 + 3 * 4096))
    plain, recompute = model.step(336, 50), model.step(336, 50, recompute=True)
    assert recompute - plain == model.decoder(336, 336)
    assert model.step(336, 50, full=True) > 1.4 * model.step(336, 50)
