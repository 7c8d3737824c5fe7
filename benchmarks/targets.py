"""What the kernels are to reach, beside what was measured. Nothing fails by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.records import Row, find, first_of_ours

EAGER = "eager"
COMPILED = "torch.compile"
MATMUL_ARGMIN = "matmul + argmin"
COMPILED_ARGMIN = "matmul + argmin, compiled"
COMPILED_ARGMIN_BF16 = "matmul + argmin, bf16, compiled"
ALL_DIFFERENCES = "DiffuSeq get_knn"
EXPANDED_SQUARE = "DiffuSeq get_efficient_knn"
FLASH_KMEANS = "flash-kmeans"


@dataclass(frozen=True)
class Target:
    """A limit on the backend that "auto" takes.

    Attributes:
        measure: "time" or "memory" as a share of the peer's, or "milliseconds"; at most `limit`.
            "bandwidth": bytes moved a second as a share of a copy's; at least `limit`.
    """

    device: str
    operation: str
    case: str
    measure: str
    limit: float
    peer: str = ""

    def __str__(self) -> str:
        what = {
            "time": f"time ≤ {self.limit:.3g}× {self.peer}",
            "memory": f"memory ≤ {self.limit:.3g}× {self.peer}",
            "milliseconds": f"≤ {self.limit:g} ms",
            "bandwidth": f"≥ {self.limit:.0%} of copy bandwidth",
        }[self.measure]
        return f"{self.operation}, {self.case}: {what}"


TARGETS = (
    Target("cpu", "rounding", "128 tokens float32", "time", 0.42, MATMUL_ARGMIN),
    Target("cpu", "rounding", "1024 tokens float32", "time", 0.22, MATMUL_ARGMIN),
    Target("cpu", "rounding", "128 tokens float32", "memory", 1 / 100, ALL_DIFFERENCES),
    Target("cpu", "noise", "1×128×128 float32", "milliseconds", 0.1),
    Target("cuda", "forward diffusion", "8192×128×128 float32", "time", 1 / 5, EAGER),
    Target("cuda", "forward diffusion", "8192×128×128 float32", "bandwidth", 0.85),
    Target("cuda", "forward diffusion", "8192×128×128 bfloat16", "time", 1 / 5, EAGER),
    Target("cuda", "forward diffusion", "8192×128×128 bfloat16", "bandwidth", 0.85),
    Target("cuda", "distillation loss", "4096×128×128 float32", "time", 1 / 4, EAGER),
    Target("cuda", "distillation loss", "4096×128×128 float32", "time", 1 / 1.6, COMPILED),
    Target("cuda", "distillation loss", "8192×128×128 bfloat16", "time", 1 / 4, EAGER),
    Target("cuda", "distillation loss", "8192×128×128 bfloat16", "time", 1 / 1.6, COMPILED),
    Target("cuda", "rounding", "16384 tokens float32", "time", 1 / 4, COMPILED_ARGMIN_BF16),
    Target("cuda", "rounding", "16384 tokens float32", "time", 1 / 1.2, FLASH_KMEANS),
    Target("cuda", "rounding", "16384 tokens float32", "time", 1 / 20, EXPANDED_SQUARE),
    Target("cuda", "rounding", "16384 tokens float32", "memory", 1 / 1000, MATMUL_ARGMIN),
    Target("cuda", "linear cross-entropy", "8192 tokens float32", "memory", 1 / 14, EAGER),
    Target("cuda", "linear cross-entropy", "8192 tokens bfloat16", "memory", 1 / 14, EAGER),
)


def judge(rows: list[Row], device: str, copy_bandwidth: float) -> list[dict[str, Any]]:
    """Each target of the device with its value and "met", "not met" or "not measured"."""
    judged = []
    for target in TARGETS:
        if target.device != device:
            continue
        value = measured(target, rows, copy_bandwidth)
        judged.append({"target": str(target), "value": value, "outcome": _outcome(target, value)})
    return judged


def measured(target: Target, rows: list[Row], copy_bandwidth: float) -> float | None:
    """The number that the target limits, or None where one of its rows is missing."""
    own = first_of_ours(rows, target.operation, target.case)
    if own is None or own.median_ms is None:
        return None
    if target.measure == "milliseconds":
        return own.median_ms
    if target.measure == "bandwidth":
        return 1e9 * (own.gigabytes_per_second or 0.0) / copy_bandwidth
    peer = find(rows, target.operation, target.case, target.peer)
    if peer is None:
        return None
    read: Callable[[Row], float | None] = (
        (lambda r: r.median_ms) if target.measure == "time" else (lambda r: r.peak_bytes)
    )
    mine, theirs = read(own), read(peer)
    return mine / theirs if mine is not None and theirs else None


def _outcome(target: Target, value: float | None) -> str:
    if value is None:
        return "not measured"
    met = value >= target.limit if target.measure == "bandwidth" else value <= target.limit
    return "met" if met else "not met"
