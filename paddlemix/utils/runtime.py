"""Device, dtype, threads and seeds: every decision about the machine is made here.

Paddle reads its thread settings once, while it is imported, so `set_cpu_defaults` runs when `paddlemix` is.
"""

from __future__ import annotations

import ctypes
import os
import warnings
import zlib
from typing import List, NamedTuple, Optional

# What set_cpu_defaults changed, for describe_threads.
_SET_BY_US: List[str] = []


def physical_cores() -> int:
    """Cores this process may use, hyper-threads of one core counted once."""
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


def _is_amd() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return "AuthenticAMD" in file.read(4096)
    except OSError:
        return False


def set_cpu_defaults() -> None:
    """Set OMP_NUM_THREADS, and MKL_DEBUG_CPU_TYPE=5 on AMD, unless the user has set them.

    Together they make Paddle's float32 matmul about five times faster on AMD machines: MKL takes its slow path
    there unless told otherwise. They have no effect after Paddle has been imported.
    """
    defaults = {"OMP_NUM_THREADS": str(physical_cores())}
    if _is_amd():
        defaults["MKL_DEBUG_CPU_TYPE"] = "5"
    for name, value in defaults.items():
        if name not in os.environ:
            os.environ[name] = value
            _SET_BY_US.append(name)
    _keep_freed_memory()
    # Paddle 2.6 exports zlib symbols of its own: whoever uses zlib for the first time after it is imported fails.
    zlib.compress(b"")
    # Two notices that Paddle's import prints at every start and that concern nobody who runs this.
    warnings.filterwarnings("ignore", message="No ccache found")
    warnings.filterwarnings("ignore", message="Setuptools is replacing distutils")


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors in place of handing it back to the kernel.

    By default every tensor above 32 MB, and many below, is mapped anew: the kernel zeroes each page again, which
    costs several times what an elementwise operation does (a softmax over 16 MB: 19 ms against 8).
    A MALLOC_… or GLIBC_TUNABLES setting of the user stands. Elsewhere than on glibc nothing happens.
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


def describe_threads() -> str:
    """One line for the log: the CPU settings and who chose them."""
    parts = []
    for name in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE"):
        if name in os.environ:
            parts.append(f"{name}={os.environ[name]} ({'default' if name in _SET_BY_US else 'from the environment'})")
    if "malloc" in _SET_BY_US:
        parts.append("freed memory is kept for reuse (default)")
    return "threads: " + ", ".join(parts)


class Choice(NamedTuple):
    """A setting that was decided here, and why it differs from what was asked (None when it does not)."""

    value: str
    reason: Optional[str] = None


def resolve_device(requested: Optional[str] = None) -> Choice:
    """The device to run on: "gpu:0" style where Paddle was built with CUDA and sees a card, else "cpu".

    requested: None (choose), "cpu", "gpu" or "gpu:N". The choice is also made Paddle's current device.
    """
    import paddle

    has_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if requested in (None, "gpu"):
        # A launcher gives each process one visible card, which is card FLAGS_selected_gpus.
        card = os.environ.get("FLAGS_selected_gpus", "0").split(",")[0] or "0"
        choice = Choice(f"gpu:{card}") if has_gpu else Choice("cpu")
    else:
        choice = Choice(requested)
    if (requested or "").startswith("gpu") and not has_gpu:
        why = "this Paddle wheel has no CUDA" if not paddle.is_compiled_with_cuda() else "no GPU is visible"
        choice = Choice("cpu", f"{why}; running on the CPU")
    paddle.set_device(choice.value)
    if choice.value == "cpu" and "FLAGS_use_stride_kernel" not in os.environ:
        # A transpose that only relabels strides makes every kernel behind it walk memory in jumps: splitting c_attn's
        # output into heads, with its gradient, takes 11 ms so and 1.2 ms copied; a training step a sixth longer.
        paddle.set_flags({"FLAGS_use_stride_kernel": False})
    return choice


def decide_dtype(requested: str, device: str, bf16_supported: bool) -> Choice:
    """The rule behind resolve_dtype, without asking the machine.

    | requested | cpu | gpu with bf16 | gpu without |
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
    """The dtype that `requested` ("float32", "float16" or "bfloat16") becomes on `device` (default: Paddle's current).

    The reason is set when it had to change; the caller logs it once.
    """
    import paddle

    device = device or paddle.get_device()
    # Compute capability 8.0 (A100) brought bf16; Paddle's own check covers the CUDA build too.
    bf16 = device.startswith("gpu") and paddle.amp.is_bfloat16_supported()
    return decide_dtype(requested, device, bf16)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and Paddle."""
    import random

    import numpy as np
    import paddle

    random.seed(seed)
    np.random.seed(seed)
    paddle.seed(seed)


def peak_rss() -> int:
    """The most memory this process has held, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
