"""Device, dtype, threads and seeds: all decisions that depend on the machine.

Paddle reads its thread settings on import, so `set_cpu_defaults` runs when `paddlemix` is imported.
"""

from __future__ import annotations

import ctypes
import os
import re
import warnings
import zlib
from typing import Dict, List, NamedTuple, Optional, Tuple

from paddlemix.utils.errors import UserError

# What set_cpu_defaults changed, for describe_threads.
_SET_BY_US: List[str] = []


def physical_cores() -> int:
    """Physical cores that this process may use."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        topology = f"/sys/devices/system/cpu/cpu{cpu}/topology/"
        try:
            with open(topology + "physical_package_id") as package, open(topology + "core_id") as core:
                cores.add((package.read(), core.read()))
        except OSError:
            cores.add((cpu,))
    return len(cores) or 1


def _mkl_cpu_type(cpuinfo: str = "/proc/cpuinfo") -> Optional[str]:
    """MKL's code path for this processor if it is AMD's: "7" for AVX-512, "5" for AVX2; None on others."""
    try:
        with open(cpuinfo) as file:
            words = set(file.read(8192).split())
    except OSError:
        return None
    if "AuthenticAMD" not in words:
        return None
    return "7" if words.issuperset(["avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"]) else "5"


def set_cpu_defaults() -> None:
    """Set OMP_NUM_THREADS, and MKL_DEBUG_CPU_TYPE on AMD, unless the user has set them.

    Together they make Paddle's float32 matmul five to ten times faster on AMD machines, where MKL takes its slow path
    by default. They have no effect once Paddle is imported.
    """
    defaults = {"OMP_NUM_THREADS": str(physical_cores())}
    cpu_type = _mkl_cpu_type()
    if cpu_type:
        defaults["MKL_DEBUG_CPU_TYPE"] = cpu_type
    for name, value in defaults.items():
        if name not in os.environ:
            os.environ[name] = value
            _SET_BY_US.append(name)
    _keep_freed_memory()
    # Paddle 2.6 exports zlib symbols of its own, with which a first use of zlib after its import fails.
    zlib.compress(b"")
    # resolve_device reports the device.
    warnings.filterwarnings("ignore", message="You are using GPU version Paddle, but")
    # Notices of Paddle's import that do not concern users of this program.
    warnings.filterwarnings("ignore", message="No ccache found")
    warnings.filterwarnings("ignore", message="Setuptools is replacing distutils")


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors instead of returning it to the kernel.

    By default every tensor above 32 MB, and many below, is a new mapping whose pages the kernel zeroes, which costs
    several times as much as an elementwise operation (a softmax over 16 MB: 19 ms instead of 8). A MALLOC_… or
    GLIBC_TUNABLES setting of the user is kept. Does nothing without glibc.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h.
    if mallopt(-3, 1 << 30) and mallopt(-1, (1 << 31) - 1):
        _SET_BY_US.append("malloc")


def decode_threads() -> int:
    """Threads that decode the next images during generation: one per core, at most eight."""
    return min(8, physical_cores())


def describe_threads() -> str:
    """One line for the log: the CPU settings and where they come from."""
    parts = []
    for name in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE"):
        if name in os.environ:
            parts.append(f"{name}={os.environ[name]} ({'default' if name in _SET_BY_US else 'from the environment'})")
    if "malloc" in _SET_BY_US:
        parts.append("freed memory is kept for reuse (default)")
    return "threads: " + ", ".join(parts)


def world_size() -> int:
    """Number of processes of this run, from paddle.distributed.launch; 1 without it."""
    return max(int(os.environ.get("PADDLE_TRAINERS_NUM", "1") or "1"), 1)


def rank() -> int:
    """This process's rank, from 0.

    Raises:
        UserError: there are not so many processes: a variable of an earlier launch is still set.
    """
    number = int(os.environ.get("PADDLE_TRAINER_ID", "0") or "0")
    if number >= world_size():
        text = f"PADDLE_TRAINER_ID is {number}, but PADDLE_TRAINERS_NUM {world_size()}: unset both, or use a launcher"
        raise UserError(text, "rank")
    return number


class Choice(NamedTuple):
    """A setting, and why it differs from the request (None if it does not)."""

    value: str
    reason: Optional[str] = None


def decide_device(requested: Optional[str], cuda_build: bool, cards: int, selected: str = "0") -> Choice:
    """The rule of resolve_device.

    cuda_build: whether the Paddle wheel has CUDA. cards: number of visible GPUs. selected: this process's own card.

    | requested | no card | a card |
    |---|---|---|
    | None | cpu; with a reason if the wheel is for GPUs | gpu:SELECTED |
    | cpu | cpu | cpu |
    | gpu | cpu, with a reason | gpu:SELECTED |
    | gpu:N | cpu, with a reason | gpu:N, or an error if there is no such card |

    Raises:
        UserError: there is no such card, though there are others; or not a device name.
    """
    if requested is not None and not re.fullmatch(r"cpu|gpu(:\d{1,3})?", requested):
        raise UserError(f"the device is cpu, gpu or gpu:N, not {requested!r}", "device")
    if requested == "cpu" or (requested is None and not cards and not cuda_build):
        return Choice("cpu")
    if not cards:
        why = "this Paddle is for GPUs, but none is visible" if cuda_build else "this Paddle wheel has no CUDA"
        return Choice("cpu", f"{why}; running on the CPU")
    if requested in (None, "gpu"):
        return Choice(f"gpu:{selected}")
    if int(requested.split(":")[1]) >= cards:
        text = f"there is no {requested}: Paddle sees {cards} GPU{'s' if cards > 1 else ''}, from gpu:0 on"
        raise UserError(text, "device")
    return Choice(requested)


def resolve_device(requested: Optional[str] = None) -> Choice:
    """The device to run on, which becomes Paddle's current one: "gpu:N" if Paddle sees a card, else "cpu".

    requested: None (choose), "cpu", "gpu" or "gpu:N".
    """
    import paddle

    cuda_build = paddle.is_compiled_with_cuda()
    cards = paddle.device.cuda.device_count() if cuda_build else 0
    # A launcher assigns one card to each process.
    selected = os.environ.get("FLAGS_selected_gpus", "0").split(",")[0] or "0"
    choice = decide_device(requested, cuda_build, cards, selected)
    paddle.set_device(choice.value)
    if choice.value == "cpu" and cuda_build:
        _look_for_cudnn_in_silence()
    if choice.value == "cpu" and "FLAGS_use_stride_kernel" not in os.environ:
        # After a transpose that only changes strides, all following kernels access memory with gaps: splitting c_attn's
        # output into heads, with its gradient, takes 11 ms instead of 1.2 ms, a training step a sixth longer.
        paddle.set_flags({"FLAGS_use_stride_kernel": False})
    return choice


def _look_for_cudnn_in_silence() -> None:
    """Suppress the seven-line warning of Paddle's GPU wheel at the first convolution without cuDNN."""
    import paddle

    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        paddle.device.get_cudnn_version()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def decide_dtype(requested: str, device: str, bf16_supported: bool) -> Choice:
    """The rule of resolve_dtype.

    | requested | cpu | gpu with bf16 (A100) | gpu without (V100) |
    |---|---|---|---|
    | float32 | float32 | float32 | float32 |
    | float16 | float32 | float16 | float16 |
    | bfloat16 | float32 | bfloat16 | float16 |
    """
    if requested not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, not {requested!r}")
    if requested == "float32":
        return Choice("float32")
    if device == "cpu":
        return Choice("float32", f"{requested} is not supported on the CPU, change to float32")
    if requested == "bfloat16" and not bf16_supported:
        return Choice("float16", "bfloat16 is not supported on your device, change to float16")
    return Choice(requested)


def resolve_dtype(requested: str, device: Optional[str] = None) -> Choice:
    """The dtype to use on `device` (default: Paddle's current) for `requested`: "float32", "float16" or "bfloat16"."""
    import paddle

    device = device or paddle.get_device()
    # Compute capability 8.0 (A100) brought bf16; Paddle's own check covers the CUDA build too.
    bf16 = device.startswith("gpu") and paddle.amp.is_bfloat16_supported()
    return decide_dtype(requested, device, bf16)


class Precision(NamedTuple):
    """compute: dtype of the matmuls. weights: dtype of the parameters. master_weights: whether the optimizer keeps
    float32 copies of them. loss_scaling: whether gradients need a loss scale (float16 only, whose smallest number is
    6e-8; bfloat16 has the range of float32)."""

    compute: str
    weights: str
    master_weights: bool
    loss_scaling: bool


def decide_precision(compute: str, opt_level: str) -> Precision:
    """The precision of training in `compute` (from resolve_dtype) at fp16_opt_level "O1" or "O2".

    | compute | level | weights | master weights | loss scale |
    |---|---|---|---|---|
    | float32 | O1, O2 | float32 | no | no |
    | float16 | O1 | float32 | no | yes |
    | float16 | O2 | float16 | yes | yes |
    | bfloat16 | O1 | float32 | no | no |
    | bfloat16 | O2 | bfloat16 | yes | no |
    """
    half = compute != "float32" and opt_level == "O2"
    return Precision(compute, compute if half else "float32", half, compute == "float16")


def decide_flash(
    requested: bool, compute: str, device: str, capability: Tuple[int, int], on_cpu: bool
) -> Tuple[bool, Optional[str]]:
    """(whether to use Paddle's fused attention, why not if it was requested).

    Its kernel needs float16 or bfloat16 and compute capability 8.0 (A100; a V100 has 7.0). On the CPU some versions
    (`on_cpu`) fall back to plain matmuls.
    """
    if requested and device == "cpu" and not on_cpu:
        return False, "use_flash_attention: this Paddle has no such kernel for the CPU; running without it"
    if not requested or device == "cpu":
        return requested, None
    if compute == "float32":
        return False, "use_flash_attention needs fp16 or bf16; running without it"
    if capability < (8, 0):
        card = ".".join(map(str, capability))
        return False, f"use_flash_attention needs compute capability 8.0, this card has {card}; running without it"
    return True, None


def resolve_flash(requested: bool, compute: str, device: str) -> Tuple[bool, Optional[str]]:
    """decide_flash on this machine's card."""
    import paddle

    from paddlemix.utils.compat import FUSED_ATTENTION_ON_CPU

    capability = paddle.device.cuda.get_device_capability(device) if device.startswith("gpu") else (0, 0)
    return decide_flash(requested, compute, device, tuple(capability), FUSED_ATTENTION_ON_CPU)


def peak_memory() -> Dict[str, int]:
    """Peak memory of this process's tensors on its card in bytes, under PaddleNLP's name; empty on the CPU.

    PaddleNLP reports it only with skip_memory_metrics off, which starts a busy thread next to the one that launches
    kernels.
    """
    import paddle

    if not paddle.get_device().startswith("gpu"):
        return {}
    return {"gpu_mem_max_memory_allocated": paddle.device.cuda.max_memory_allocated()}


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and Paddle."""
    import random

    import numpy as np
    import paddle

    random.seed(seed)
    np.random.seed(seed)
    paddle.seed(seed)


def seed_step(seed: int, step: int, dataset_rank: int = 0, tensor_rank: int = 0) -> None:
    """Seed Paddle for one training step, so that dropout depends only on seed, step and card.

    A resumed run then repeats the uninterrupted one without stored generator states, which Paddle 2.6 cannot restore on
    the CPU, and evaluations change nothing.

    dataset_rank: differs between cards with different samples; tensor_rank: between cards that share matrices, which
    must draw the same numbers outside of them and different ones inside (fleet's "local_seed").
    """
    import numpy as np
    import paddle
    from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

    def mixed(*parts: int) -> int:
        return int(np.random.SeedSequence([seed, step, dataset_rank, *parts]).generate_state(1)[0])

    paddle.seed(mixed(0))
    tracker = get_rng_state_tracker()
    for number, name in enumerate(sorted(tracker.states_), 1):
        with tracker.rng_state(name):
            paddle.seed(mixed(number, tensor_rank if name == "local_seed" else 0))
