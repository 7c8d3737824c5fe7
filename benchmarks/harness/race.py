"""Implementations of one operation on the same inputs: checked, then timed in turns.

A wrong result is never timed. The peers run between the rounds of pytest-benchmark's own
measurement, so that every ratio is of times taken side by side: a machine that slows down
slows all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest

from benchmarks.harness.checks import Check
from benchmarks.harness.floors import Machine, Work
from benchmarks.harness.records import Row
from benchmarks.harness.timing import Call, Stopwatch, peak_memory
from dlmone_fast.errors import BackendUnavailableError
from dlmone_fast.kernels import dispatch

OURS, EAGER, COMPILED = "dlmone_fast", "eager", "torch.compile"
"""Names of implementations: this package's, and plain PyTorch as written and compiled."""

_SECONDS_EACH = 1.0
_MOST_ROUNDS, _FEWEST_ROUNDS = 200, 5
# Shorter calls are timed right after one of the same kind that does not count: the call before was
# another implementation's, which left its data in the caches and its threads awake.
_SHORT_SECONDS = 1e-3
# Slow peers get no more than these samples.
_FEWEST_SAMPLES = 3


def ours(operation: str, call: Callable[[str], Any]) -> dict[str, Call]:
    """`call(backend)` for each backend that "auto" may take here, the one it takes first."""
    found: dict[str, Call] = {}
    for backend in dispatch.backends(operation):
        if not backend.automatic():
            continue
        try:
            call(backend.name)
        except BackendUnavailableError:
            continue
        found[f"{OURS} {backend.name}"] = partial(call, backend.name)
    return found


@dataclass(frozen=True)
class Race:
    """Runs one case and hands its rows to `report`.

    Args of a call:
        operation, case: name of the operation and of the shape.
        implementations: what to run, ours first; names of ours begin with `OURS`.
        check: None, or what is wrong with a result. A peer that fails or is wrong is reported
            and not timed; one of ours ends the test. No check: the caller has seen to it.
        work: the bytes and operations that any implementation needs.
        check_peer: for peers whose result is not ours number by number; default: `check`.
        fields: what else is known of an implementation: fields of its row. A name that is not
            among the implementations gets a row without times.
        expected: seconds of calls that need no call to warm up and to see how long they take.

    Attributes:
        seconds_each: how long each implementation is timed, within bounds on the number of samples.
        short_seconds: calls below this are timed right after one that does not count.
        fewest_rounds, most_rounds: bounds on the samples of the first implementation.
        fewest_samples: bound on those of the others.
        memory: whether peak memory is measured, in one more call of each.
    """

    benchmark: Any
    stopwatch: Stopwatch
    machine: Machine
    report: Callable[[list[Row]], None]
    seconds_each: float = _SECONDS_EACH
    short_seconds: float = _SHORT_SECONDS
    fewest_rounds: int = _FEWEST_ROUNDS
    most_rounds: int = _MOST_ROUNDS
    fewest_samples: int = _FEWEST_SAMPLES
    memory: bool = True

    def __call__(
        self,
        operation: str,
        case: object,
        implementations: Mapping[str, Call],
        check: Check | None,
        work: Work,
        check_peer: Check | None = None,
        fields: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        expected: Mapping[str, float] = MappingProxyType({}),
    ) -> list[Row]:
        known = {
            "shape": getattr(case, "dimensions", str(case)),
            "dtype": str(getattr(case, "dtype", "")).removeprefix("torch."),
        }
        rows = {
            n: Row(operation, str(case), n, n.startswith(OURS), **{**known, **fields.get(n, {})})
            for n in [*implementations, *fields]
        }
        runnable: dict[str, Call] = {}
        for name, call in implementations.items():
            own, checked = rows[name].ours, check if rows[name].ours else check_peer or check
            complaint = _try(call, checked, must_run=own) if checked else None
            if complaint:
                rows[name] = replace(rows[name], note=complaint)
            else:
                runnable[name] = call
        for name, seconds in self._time(runnable, expected).items():
            warmup = int(name not in expected)
            rows[name] = self._fill(replace(rows[name], warmup=warmup), seconds, work)
        for name, call in runnable.items():
            if rows[name].part or not self.memory:
                continue
            peak = peak_memory(call, self.stopwatch.device)
            rows[name] = replace(rows[name], peak_bytes=peak)
        self.benchmark.extra_info.update(operation=operation, case=str(case))
        self.report(list(rows.values()))
        return list(rows.values())

    def _time(self, calls: dict[str, Call], known: Mapping[str, float]) -> dict[str, list[float]]:
        expected = {n: known.get(n) or self.stopwatch.time(call) for n, call in calls.items()}
        first, *others = calls
        fewest, most = self.fewest_rounds, self.most_rounds
        rounds = _between(fewest, int(self.seconds_each / expected[first]), most)
        counts = {
            name: _between(self.fewest_samples, int(self.seconds_each / expected[name]), rounds)
            for name in others
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}

        def take(name: str) -> None:
            if expected[name] < self.short_seconds:
                calls[name]()
            seconds[name].append(self.stopwatch.time(calls[name]))

        def peers() -> None:
            done = len(seconds[first])
            for name, count in counts.items():
                if (done + 1) * count // rounds > done * count // rounds:
                    take(name)

        self.benchmark.pedantic(take, args=(first,), setup=peers, rounds=rounds)
        return seconds

    def _fill(self, row: Row, seconds: list[float], work: Work) -> Row:
        row = replace(row, **statistics_of(seconds))
        # The work is that of the whole.
        if row.part:
            return row
        median, floor = statistics.median(seconds), self.machine.floor_seconds(work)
        return replace(
            row,
            gigabytes_per_second=work.bytes / median / 1e9,
            teraflops=work.flops / median / 1e12 if work.flops else None,
            floor_ms=1e3 * floor,
            fraction_of_floor=floor / median,
        )


def statistics_of(seconds: Sequence[float]) -> dict[str, Any]:
    """The fields of a row that sum up its samples."""
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "mean_ms": 1e3 * statistics.fmean(seconds),
        "min_ms": 1e3 * min(seconds),
        "p20_ms": 1e3 * percentile(seconds, 20),
        "p80_ms": 1e3 * percentile(seconds, 80),
        "p99_ms": 1e3 * percentile(seconds, 99),
        "samples": len(seconds),
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """The least value that so many per cent of the values do not exceed."""
    return sorted(values)[math.ceil(percent * len(values) / 100) - 1]


def _try(call: Call, check: Check, must_run: bool) -> str | None:
    if must_run:
        complaint = check(call())
        if complaint:
            pytest.fail(f"wrong, so not timed: {complaint}")
        return None
    try:
        complaint = check(call())
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"failed: {type(error).__name__}: {reason[:120]}"
    return f"wrong, so not timed: {complaint}" if complaint else None


def _between(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))
