"""The machine of a run: this one, or the cards that `--plan_for` names."""

from __future__ import annotations

import os
import re
from typing import Dict, NamedTuple, Optional, Tuple

from paddlemix.utils.errors import ConfigError
from paddlemix.utils.runtime import resolve_device, world_size


class Card(NamedTuple):
    """memory: GiB that CUDA reports, less than the name says: ECC takes a sixteenth of a T4, A10 or L40S, and the
    driver reserves some. capability: compute capability. flops, bandwidth: published peaks, in dense tensor-core FLOP/s
    (half-precision inputs, float32 accumulation) and bytes/s.
    """

    memory: float
    capability: Tuple[int, int]
    flops: float
    bandwidth: float


CARDS: Dict[str, Card] = {
    "V100-16GB": Card(15.78, (7, 0), 125e12, 0.90e12),
    "V100-32GB": Card(31.74, (7, 0), 125e12, 0.90e12),
    "T4-16GB": Card(14.58, (7, 5), 65e12, 0.32e12),
    "A10-24GB": Card(22.06, (8, 6), 125e12, 0.60e12),
    "RTX3090-24GB": Card(23.67, (8, 6), 71e12, 0.94e12),
    "RTX4090-24GB": Card(23.65, (8, 9), 165e12, 1.01e12),
    "L40S-48GB": Card(44.4, (8, 9), 362e12, 0.86e12),
    "A100-40GB": Card(39.5, (8, 0), 312e12, 1.56e12),
    "A100-80GB": Card(79.15, (8, 0), 312e12, 2.04e12),
    "H100-80GB": Card(79.1, (9, 0), 989e12, 3.35e12),
}
# The first with bfloat16 (A100).
_BF16_FROM = (8, 0)


class Machine(NamedTuple):
    """device: Paddle's name, "cpu" or "gpu:0". name, memory (bytes), capability: of one card, or of the CPU. bf16:
    whether it computes in bfloat16. cards: number of processes, one card each. flops: see Card; None if unknown."""

    device: str
    name: str
    memory: int
    capability: Tuple[int, int]
    bf16: bool
    cards: int
    flops: Optional[float] = None

    @property
    def gpu(self) -> bool:
        return self.device.startswith("gpu")


def card(text: str) -> Machine:
    """The machine that `--plan_for` names, such as "8xA100-80GB" or "V100-32GB".

    Raises:
        ConfigError: not of the form [Nx]CARD, or an unknown card.
    """
    found = re.fullmatch(r"(?:(\d{1,4})\s*[x×*]\s*)?(\S+)", text.strip(), re.IGNORECASE)
    names = {name.lower(): name for name in CARDS}
    if found is None or found.group(2).lower() not in names or int(found.group(1) or 1) < 1:
        known = ", ".join(CARDS)
        raise ConfigError(f"--plan_for: {text!r} is not [Nx]CARD, such as 8xA100-80GB; cards: {known}", "plan_for")
    name = names[found.group(2).lower()]
    one = CARDS[name]
    memory, bf16 = int(one.memory * 2**30), one.capability >= _BF16_FROM
    return Machine("gpu:0", name, memory, one.capability, bf16, int(found.group(1) or 1), one.flops)


def this_machine(requested: Optional[str]) -> Tuple[Machine, Optional[str]]:
    """(this machine under this `device` key, why it is not the requested device, if so). Sets Paddle's current device.

    Raises:
        UserError: there is no such card, or it is not a device name.
    """
    import paddle

    choice = resolve_device(requested)
    if choice.value.startswith("gpu"):
        properties = paddle.device.cuda.get_device_properties(choice.value)
        capability = tuple(paddle.device.cuda.get_device_capability(choice.value))
        bf16 = paddle.amp.is_bfloat16_supported()
        found = Machine(choice.value, properties.name, properties.total_memory, capability, bf16, world_size())
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found = Machine("cpu", "CPU", total // world_size(), (0, 0), False, world_size())
    return found, choice.reason
