"""Published rates of devices that people train on, for forecasts where they are not at hand.

Rates are the makers' own, of one device: dense products in bfloat16 with sums in float32 (float16 where a device has no bfloat16), and the
bandwidth of its memory. Training reaches a part of them (`REACHED`), which is assumed and not measured on these devices.
"""

import re
from typing import NamedTuple

from layercard.errors import CardError, suggestion

REACHED = 0.5
"""Share of the published FLOP/s and bytes/s that training is taken to reach: assumed, see `layercard plan` and docs/cost.md."""
MARGIN = 2.5
"""How far a forecast from rates may be off: on a CPU, from the rates that it reaches, times came out 2.2 to 2.7 times too short."""
LAUNCH = 1e-5
"""Seconds that the smallest operation takes, Python's part included."""


class Rates(NamedTuple):
    """A device: TFLOP/s of dense bfloat16 products, GB/s of its memory, GB of it, and where the maker says so."""

    name: str
    tflops: float
    bandwidth: float
    memory: float
    source: str

    @property
    def flops(self) -> float:
        """FLOP/s that training is taken to reach."""
        return REACHED * self.tflops * 1e12

    @property
    def bytes_per_second(self) -> float:
        """Bytes/s that training is taken to reach."""
        return REACHED * self.bandwidth * 1e9


DEVICES = {
    device.name: device
    for device in (
        Rates("T4", 65, 320, 16, "nvidia.com/en-us/data-center/tesla-t4 (float16)"),
        Rates("L4", 121, 300, 24, "nvidia.com/en-us/data-center/l4 (half of the figure with sparsity)"),
        Rates("A10", 125, 600, 24, "nvidia.com/en-us/data-center/products/a10-gpu"),
        Rates("A100", 312, 2039, 80, "nvidia.com/en-us/data-center/a100 (80 GB, SXM)"),
        Rates("H100", 989, 3350, 80, "nvidia.com/en-us/data-center/h100 (SXM, half of the figure with sparsity)"),
        Rates("RTX3090", 71, 936, 24, "NVIDIA Ampere GA102 GPU Architecture, white paper"),
        Rates("RTX4090", 165, 1008, 24, "NVIDIA Ada GPU Architecture, white paper"),
        Rates("M1-Max", 10.4, 400, 64, "apple.com/newsroom, October 2021"),
        Rates("M2-Ultra", 27.2, 800, 192, "apple.com/newsroom, June 2023"),
    )
}
"""The devices by name. Apple names FLOP/s of float32 only, which its GPUs also reach in 16 bits."""


def device_named(name: str) -> Rates:
    """The device of a name, however it is spelt.

    >>> device_named("rtx 4090").memory
    24

    Raises:
        CardError: There is no such device in the table.
    """
    plain = {_plain(known): known for known in DEVICES}
    if _plain(name) not in plain:
        raise CardError(f"device {name[:40]!r} is not in the table; {suggestion(name, DEVICES)}")
    return DEVICES[plain[_plain(name)]]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower()).removeprefix("nvidia").removeprefix("geforce")
