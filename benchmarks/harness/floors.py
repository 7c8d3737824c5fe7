"""The machine's best time for some work: bytes that must move, operations that must be done.

Work counts what any implementation has to read and write once, and no intermediate result. A floor
is taken against published sustained rates where they are known, else against a copy and matrix
products measured in the same run. Where everything fits a cache, an operation may be faster than
its floor, which assumes memory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.harness.timing import Stopwatch

# Sustained rates in bytes and operations a second: reads plus writes, and dense bf16 products.
_PUBLISHED = {"H200": (4.3e12, 790e12)}
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
_PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
_ROUNDS = 7


@dataclass(frozen=True)
class Work:
    """Bytes to move and floating-point operations to do; `precision` of their product."""

    bytes: int
    flops: int = 0
    precision: str = "fp32"


@dataclass(frozen=True)
class Machine:
    """Rates of a device: bytes a second, operations a second in fp32 and bf16.

    `copy` is always measured; `bandwidth` and `bf16` are published figures where `source` says so.
    """

    bandwidth: float
    copy: float
    fp32: float
    bf16: float
    source: str

    def floor_seconds(self, work: Work) -> float:
        """The shortest time for this work."""
        rate = self.bf16 if work.precision == "bf16" else self.fp32
        return max(work.bytes / self.bandwidth, work.flops / rate)

    def record(self) -> dict[str, Any]:
        """For the JSON record, in GB/s and TFLOP/s."""
        figures = asdict(self)
        return {
            "bandwidth_gb_s": figures["bandwidth"] / 1e9,
            "copy_gb_s": figures["copy"] / 1e9,
            "fp32_tflop_s": figures["fp32"] / 1e12,
            "bf16_tflop_s": figures["bf16"] / 1e12,
            "source": self.source,
        }


def measure_machine(device: torch.device, name: str, stopwatch: Stopwatch) -> Machine:
    """Rates of `device`, measured now; published ones replace them where they are known."""
    source = torch.empty(_COPY_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / stopwatch.best(lambda: target.copy_(source), _ROUNDS)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        size = _PRODUCT_SIZE[device.type]
        factor = torch.randn(size, size, device=device).to(dtype)
        product = torch.empty_like(factor)
        seconds = stopwatch.best(partial(torch.mm, factor, factor, out=product), _ROUNDS)
        rates[dtype] = 2 * size**3 / seconds
    fp32, bf16 = rates[torch.float32], rates[torch.bfloat16]
    for part, (bandwidth, published) in _PUBLISHED.items():
        if device.type == "cuda" and part in name:
            return Machine(bandwidth, copy, fp32, published, f"published for {part}; fp32 measured")
    return Machine(copy, copy, fp32, bf16, "measured")
