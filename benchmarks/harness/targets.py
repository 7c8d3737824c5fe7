"""Targets beside what was measured. Nothing fails by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.records import Row, find, first_of_ours

FASTEST = "fastest of ours"


@dataclass(frozen=True)
class Target:
    """A limit on one of our implementations.

    Attributes:
        measure: "time" or "memory" as a share of the peer's, or "milliseconds"; at most `limit`.
            "bandwidth": bytes moved a second as a share of a copy's, and "sequences" of calls of
            `batch` a second; at least `limit`.
        own: which of ours; "": the one that "auto" takes.
    """

    device: str
    operation: str
    case: str
    measure: str
    limit: float
    peer: str = ""
    own: str = ""
    batch: int = 1

    def __str__(self) -> str:
        what = {
            "time": f"time ≤ {self.limit:.3g}× {self.peer}",
            "memory": f"memory ≤ {self.limit:.3g}× {self.peer}",
            "milliseconds": f"≤ {self.limit:g} ms",
            "bandwidth": f"≥ {self.limit:.0%} of copy bandwidth",
            "sequences": f"≥ {self.limit:g} sequences/s",
        }[self.measure]
        subject = f"{self.own} " if self.own else ""
        return f"{self.operation}, {self.case}: {subject}{what}"


DERIVED = " (derived)"
"""Ends an outcome whose peer was not measured as a whole."""


def judge(
    rows: list[Row], device: str, copy_bandwidth: float, targets: Sequence[Target]
) -> list[dict[str, Any]]:
    """Each target of the device with its value and "met", "not met" or "not measured".

    There are none where the run timed none of their operations.
    """
    if not {target.operation for target in targets} & {row.operation for row in rows}:
        return []
    judged = []
    for target in targets:
        if target.device != device:
            continue
        value = measured(target, rows, copy_bandwidth)
        outcome = _outcome(target, value, _own(target, rows))
        peer = find(rows, target.operation, target.case, target.peer)
        if value is not None and peer is not None and peer.derived:
            outcome += DERIVED
        judged.append({"target": str(target), "value": value, "outcome": outcome})
    return judged


def measured(target: Target, rows: list[Row], copy_bandwidth: float) -> float | None:
    """The number that the target limits, or None where one of its rows is missing."""
    own = _own(target, rows)
    if own is None or own.median_ms is None:
        return None
    if target.measure == "milliseconds":
        return own.median_ms
    if target.measure == "sequences":
        return 1e3 * target.batch / own.median_ms
    if target.measure == "bandwidth":
        return 1e9 * (own.gigabytes_per_second or 0.0) / copy_bandwidth
    peer = find(rows, target.operation, target.case, target.peer)
    if peer is None:
        return None
    read: Callable[[Row], float | None] = (
        (lambda r: r.median_ms) if target.measure == "time" else _memory
    )
    mine, theirs = read(own), read(peer)
    return mine / theirs if mine is not None and theirs else None


def _own(target: Target, rows: list[Row]) -> Row | None:
    if target.own == FASTEST:
        key = (target.operation, target.case)
        times = {
            row.implementation: row.median_ms
            for row in rows
            if (row.operation, row.case) == key and row.ours and not row.part and row.median_ms
        }
        return find(rows, *key, min(times, key=times.__getitem__)) if times else None
    if target.own:
        return find(rows, target.operation, target.case, target.own)
    return first_of_ours(rows, target.operation, target.case)


def _memory(row: Row) -> float | None:
    return None if row.peak_bytes is None else row.peak_bytes + (row.held_bytes or 0)


def _outcome(target: Target, value: float | None, own: Row | None) -> str:
    if value is None:
        reason = own.note.removeprefix("absent: ") if own else ""
        return f"not measured: {reason}" if reason else "not measured"
    at_least = target.measure in ("bandwidth", "sequences")
    met = value >= target.limit if at_least else value <= target.limit
    return "met" if met else "not met"
