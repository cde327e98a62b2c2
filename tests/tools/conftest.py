"""A packed submission of a tiny model, made once; its copies cost nothing, as the weights are links."""

import json
import os
import shutil
import sys

import pytest

from tests.inference.talking import save_talking_model
from tools import pack_submission


@pytest.fixture(scope="session")
def merged(tmp_path_factory):
    """A whole model folder that says eight tokens per image."""
    folder = save_talking_model(tmp_path_factory.mktemp("merged") / "mgen_vl_lora_merge", seed=5)
    path = os.path.join(folder, "generation_config.json")
    with open(path) as file:
        values = dict(json.load(file), max_new_tokens=8)
    with open(path, "w") as file:
        json.dump(values, file)
    return folder


@pytest.fixture(scope="session")
def packed(tmp_path_factory, merged):
    """The submission folder that tools/pack_submission.py makes of it."""
    out = tmp_path_factory.mktemp("packed") / "submission"
    before, sys.argv = sys.argv, ["pack_submission.py", "--weights", merged, "--out", str(out)]
    try:
        assert pack_submission.main() == 0
    finally:
        sys.argv = before
    return out


@pytest.fixture
def submission(packed, tmp_path):
    """A copy of it to break. Weights are copied, too: a test may write into them."""
    return shutil.copytree(packed, tmp_path / "submission")
