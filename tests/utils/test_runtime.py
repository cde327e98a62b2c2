"""Choice of device, dtype and threads."""

import json
import os
import subprocess
import sys

import pytest

from paddlemix.utils import runtime
from paddlemix.utils.errors import UserError
from tests.helpers import refused

# requested, device, bf16 supported → dtype, whether a reason is given
DTYPES = [
    ("float32", "cpu", False, "float32", False),
    ("float16", "cpu", False, "float32", True),
    ("bfloat16", "cpu", False, "float32", True),
    ("float32", "gpu:0", True, "float32", False),
    ("float16", "gpu:0", True, "float16", False),
    ("float16", "gpu:0", False, "float16", False),
    ("bfloat16", "gpu:0", True, "bfloat16", False),
    ("bfloat16", "gpu:0", False, "float16", True),
    ("bfloat16", "gpu:3", False, "float16", True),
]


@pytest.mark.parametrize("requested, device, bf16, expected, changed", DTYPES)
def test_dtype_table(requested, device, bf16, expected, changed):
    choice = runtime.decide_dtype(requested, device, bf16)
    assert choice.value == expected and (choice.reason is not None) == changed


def test_unknown_dtype():
    with pytest.raises(ValueError, match="float64"):
        runtime.decide_dtype("float64", "cpu", False)


# requested, wheel with CUDA, cards, card of this process → device, a word of the reason
DEVICES = [
    (None, False, 0, "0", "cpu", None),
    (None, True, 0, "0", "cpu", "for GPUs, but none is visible"),
    (None, True, 1, "0", "gpu:0", None),
    (None, True, 8, "5", "gpu:5", None),
    ("cpu", True, 8, "0", "cpu", None),
    ("gpu", False, 0, "0", "cpu", "no CUDA"),
    ("gpu", True, 0, "0", "cpu", "for GPUs, but none is visible"),
    ("gpu", True, 2, "1", "gpu:1", None),
    ("gpu:1", False, 0, "0", "cpu", "no CUDA"),
    ("gpu:1", True, 2, "0", "gpu:1", None),
]


@pytest.mark.parametrize("requested, cuda, cards, selected, expected, reason", DEVICES)
def test_device_table(requested, cuda, cards, selected, expected, reason):
    choice = runtime.decide_device(requested, cuda, cards, selected)
    assert choice.value == expected
    assert choice.reason is None if reason is None else reason in choice.reason


def test_devices_that_are_not_there():
    with refused(UserError, "device"):
        runtime.decide_device("gpu:2", True, 2)
    for name in ("xpu", "gpu:", "gpu:x", "cpu:0", ""):
        with refused(UserError, "device"):
            runtime.decide_device(name, True, 2)


# what the run asks for, level, machine → compute, weights, master weights, loss scale
CPU, V100, A100 = ("cpu", False), ("gpu:0", False), ("gpu:0", True)
PRECISIONS = [
    ("float32", "O1", V100, "float32", "float32", False, False),
    ("float32", "O2", A100, "float32", "float32", False, False),
    ("float16", "O1", V100, "float16", "float32", False, True),
    ("float16", "O2", V100, "float16", "float16", True, True),
    ("float16", "O2", A100, "float16", "float16", True, True),
    ("bfloat16", "O1", A100, "bfloat16", "float32", False, False),
    ("bfloat16", "O2", A100, "bfloat16", "bfloat16", True, False),
    ("bfloat16", "O1", V100, "float16", "float32", False, True),
    ("bfloat16", "O2", V100, "float16", "float16", True, True),
    ("float16", "O2", CPU, "float32", "float32", False, False),
    ("bfloat16", "O1", CPU, "float32", "float32", False, False),
]


@pytest.mark.parametrize("requested, level, machine, compute, weights, master, scale", PRECISIONS)
def test_precision_table(requested, level, machine, compute, weights, master, scale):
    choice = runtime.decide_dtype(requested, *machine)
    assert runtime.decide_precision(choice.value, level) == (compute, weights, master, scale)


# requested, compute, device, capability → used, a word of the reason
FLASH = [
    (False, "float16", "gpu:0", (8, 0), False, None),
    (True, "float16", "gpu:0", (8, 0), True, None),
    (True, "bfloat16", "gpu:0", (9, 0), True, None),
    (True, "float16", "gpu:0", (7, 0), False, "this card has 7.0"),
    (True, "float32", "gpu:0", (8, 0), False, "fp16 or bf16"),
    (True, "float32", "cpu", (0, 0), True, None),
    (True, "float32", "old cpu", (0, 0), False, "no such kernel for the CPU"),
]


@pytest.mark.parametrize("requested, compute, device, capability, used, reason", FLASH)
def test_flash_table(requested, compute, device, capability, used, reason):
    found, why = runtime.decide_flash(requested, compute, device.split()[-1], capability, device != "old cpu")
    assert found == used
    assert why is None if reason is None else reason in why


def test_resolve_here():
    import paddle

    assert runtime.resolve_device("cpu") == ("cpu", None)
    assert runtime.resolve_dtype("bfloat16", "cpu").value == "float32"
    if "FLAGS_use_stride_kernel" not in os.environ:
        assert paddle.get_flags("FLAGS_use_stride_kernel") == {"FLAGS_use_stride_kernel": False}
    if not paddle.is_compiled_with_cuda():
        choice = runtime.resolve_device("gpu")
        assert choice.value == "cpu" and "no CUDA" in choice.reason
        assert runtime.resolve_device("gpu:1").value == "cpu"
        assert runtime.resolve_device(None) == ("cpu", None)


def test_a_gpu_wheel_without_a_card_is_quiet_about_cudnn():
    import paddle

    if not paddle.is_compiled_with_cuda() or paddle.device.cuda.device_count():
        pytest.skip("needs a GPU wheel on a machine without a card")
    code = (
        "import paddlemix, paddle; from paddlemix.utils.runtime import resolve_device; choice = resolve_device('gpu')\n"
        "assert choice.value == 'cpu' and 'none is visible' in choice.reason, choice\n"
        "paddle.nn.Conv2D(3, 4, 2)(paddle.zeros([1, 3, 4, 4]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "cudnn" not in done.stderr, done.stderr


def fresh(code, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")}
    out = subprocess.run([sys.executable, "-c", code], env=dict(env, **environment), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


SHOW = (
    "import json, os, paddlemix; from paddlemix.utils.runtime import describe_threads;"
    "print(json.dumps([os.environ.get('OMP_NUM_THREADS'), os.environ.get('MKL_DEBUG_CPU_TYPE'), describe_threads()]))"
)


def test_thread_defaults_and_the_users_own():
    omp, mkl, line = fresh(SHOW)
    assert omp == str(runtime.physical_cores())
    assert mkl == runtime._mkl_cpu_type()
    assert f"OMP_NUM_THREADS={omp} (default)" in line
    assert ("freed memory is kept" in line) == sys.platform.startswith("linux")
    omp, mkl, line = fresh(SHOW, OMP_NUM_THREADS="1", MKL_DEBUG_CPU_TYPE="7", MALLOC_ARENA_MAX="2")
    assert (omp, mkl) == ("1", "7") and line.count("from the environment") == 2
    assert "freed memory" not in line


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("AuthenticAMD", "fma avx2 avx512f avx512dq avx512cd avx512bw avx512vl", "7"),
        ("AuthenticAMD", "fma avx2 avx512f", "5"),
        ("AuthenticAMD", "fma avx2", "5"),
        ("GenuineIntel", "fma avx2 avx512f avx512dq avx512cd avx512bw avx512vl", None),
    ],
)
def test_mkls_code_path_is_the_widest_that_an_amd_processor_has(tmp_path, vendor, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} pku\n")
    assert runtime._mkl_cpu_type(str(tmp_path / "cpuinfo")) == expected
    assert runtime._mkl_cpu_type(str(tmp_path / "none")) is None


def test_zlib_works_after_paddle():
    """Paddle 2.6 has zlib symbols of its own, on which the first use of zlib after its import dies of SIGSEGV."""
    code = "import paddlemix, paddle, json, zlib; print(json.dumps(len(zlib.decompress(zlib.compress(bytes(99))))))"
    assert fresh(code) == 99


def test_seed_makes_the_same_numbers():
    import random

    import numpy as np
    import paddle

    def draw():
        runtime.seed_everything(3)
        return random.random(), np.random.rand(), float(paddle.rand([1]))

    assert draw() == draw()


def test_a_step_draws_what_it_draws_whatever_came_before():
    import paddle
    from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker
    from paddlenlp.trainer.trainer_utils import set_seed

    set_seed(1)
    tracker = get_rng_state_tracker()

    def draw(*where):
        runtime.seed_step(3, *where)
        drawn = [float(paddle.rand([1]))]
        for name in ("global_seed", "local_seed"):
            with tracker.rng_state(name):
                drawn.append(float(paddle.rand([1])))
        return drawn

    first = draw(5)
    others = {tuple(draw(6)), tuple(draw(5, 1)), tuple(draw(4, 1))}
    assert len(others | {tuple(first)}) == 4 and draw(5) == first
    # Cards that share matrices draw the same, but for what each holds a part of.
    beside = draw(5, 0, 1)
    assert beside[:2] == first[:2] and beside[2] != first[2]


def test_a_rank_left_in_the_environment_is_refused(monkeypatch):
    """With it a run would leave out its first batch."""
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    assert runtime.rank() == 1
    for processes in ("1", ""):
        monkeypatch.setenv("PADDLE_TRAINERS_NUM", processes)
        with refused(UserError, "rank", match="PADDLE_TRAINER_ID is 1, but PADDLE_TRAINERS_NUM 1: unset both"):
            runtime.rank()
