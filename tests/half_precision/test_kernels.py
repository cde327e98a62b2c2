"""The contest platform's wheel has a GPU kernel for every operator that is called, in the dtype that it gets there.

Nothing runs on a GPU: the simulator computes with stand-ins on the CPU (kernel_trace.py), and the wheel knows by name
which kernels it has for a GPU.
"""

import os
import re
import subprocess
import sys

import paddle
import pytest
from paddle.base import core

from tests.helpers import save_tiny_model

# What the simulator's storage stands for; all else is what it is.
_STANDS_FOR = {"float64": "float32", "float32": None}
# GradScaler itself is off on a CPU: kernel_trace.py calls what it calls for the gradients, and this is the rest.
_SCALER = {("update_loss_scaling", "float32"): {"GradScaler"}}


@pytest.fixture(scope="module", autouse=True)
def gpu_wheel():
    if not paddle.is_compiled_with_cuda():
        pytest.skip("needs a GPU wheel, which knows its kernels without a card: PADDLE26=paddlepaddle-gpu==2.6.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.half_precision.world import QUERIES

    return save_tiny_model(tmp_path_factory.mktemp("kernels") / "model", 3, visual={"n_queries": QUERIES})


@pytest.fixture(scope="module")
def registered():
    """Dtypes of each kernel on a GPU, by name."""
    found = {}
    for name, keys in core._get_registered_phi_kernels().items():
        found[name] = {key.split(",")[-1].strip(" )") for key in keys if key.startswith("(GPU")}
    return found


def called(root, dtype, level, folder, *only):
    """{(kernel, dtype): {where from}} of a run of kernel_trace.py."""
    command = [sys.executable, "-m", "tests.half_precision.kernel_trace", dtype, level, folder, *only]
    environment = dict(os.environ, GLOG_v="6", OMP_NUM_THREADS="1")
    found, errors, step, caller = {}, [], "", ""
    with subprocess.Popen(
        command, cwd=root, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        # Read as it comes: it is some 100 MB.
        for line in process.stderr:
            key = re.search(r"(\w+) API kernel key: \[\w+, \w+, (\w+)\]", line)
            if line.startswith("STEP "):
                step = line[5:].strip()
            elif line.startswith("CALLER "):
                caller = line[7:].strip()
            elif key and step:
                kernel, stored = key.groups()
                # In place, an operator calls the same kernel.
                kernel = kernel.rstrip("_")
                found.setdefault((kernel, _STANDS_FOR.get(stored, stored) or dtype), set()).add(f"{caller} ({step})")
            elif not re.match(r"[IWE]\d{4} ", line):
                errors = [*errors[-15:], line]
    return found, process.returncode, "".join(errors)


def missing(found, registered):
    """A line for each operator that no GPU kernel serves: its name, dtype, and from where it is called."""
    return [
        f"{kernel} has no {dtype} kernel on a GPU ({sorted(registered.get(kernel, ()))}): {', '.join(sorted(where))}"
        for (kernel, dtype), where in sorted(found.items())
        if dtype not in registered.get(kernel, ())
    ]


@pytest.mark.slow
@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_operator_has_a_kernel_in_the_dtype_it_gets(root, folder, registered, dtype, level):
    found, status, errors = called(root, dtype, level, folder)
    lacking = missing({**found, **_SCALER}, registered)
    assert not lacking, "\n".join(lacking)
    assert status == 0, errors
    # The trace is one: half and float32 products, what trains, what generates.
    assert len({kernel for kernel, _ in found}) > 80
    expected = {("matmul", dtype), ("flash_attn_grad", dtype), ("conv2d", dtype), ("softmax", "float32")}
    expected |= {("adamw", dtype if level == "O2" else "float32"), ("norm_grad", "float32"), ("isfinite", "float32")}
    if level == "O2":
        expected |= {("set_value_with_tensor", dtype), ("topk", "float32"), ("rms_norm", dtype)}
        expected |= {("put_along_axis", "float32"), ("cross_entropy_with_softmax", "float32")}
    assert expected <= set(found), expected - set(found)


def test_an_operator_without_a_kernel_is_named_with_its_caller(root, folder, registered):
    found, status, errors = called(root, "bfloat16", "O2", folder, "broken")
    assert status == 0, errors
    lacking = missing(found, registered)
    # The rows of the loss, and their mean.
    assert [line.split()[0] for line in lacking] == ["cross_entropy_with_softmax", "mean_all"]
    assert all("no bfloat16 kernel" in line and "a loss in half precision (broken)" in line for line in lacking)
    # float16 has both.
    assert not missing(called(root, "float16", "O2", folder, "broken")[0], registered)
