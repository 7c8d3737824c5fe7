"""Only right results are timed, in turns, and what a call needs is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness.floors import Machine, Work
from benchmarks.harness.race import Race, ours, percentile
from benchmarks.harness.records import Row
from benchmarks.harness.timing import Stopwatch, peak_memory

CPU = torch.device("cpu")
MACHINE = Machine(bandwidth=1e9, copy=1e9, fp32=1e12, bf16=1e12, source="made up")


class Pedantic:
    """As much of pytest-benchmark's fixture as a race uses."""

    def __init__(self) -> None:
        self.extra_info: dict[str, str] = {}

    def pedantic(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        setup: Callable[[], None],
        rounds: int,
    ) -> None:
        for _ in range(rounds):
            setup()
            function(*args)


def run(
    implementations: dict[str, Callable[[], Any]],
    fields: dict[str, dict[str, Any]] | None = None,
    **attributes: float,
) -> dict[str, Row]:
    reported: list[Row] = []
    race = Race(Pedantic(), Stopwatch(CPU), MACHINE, reported.extend, **attributes)
    work = Work(bytes=8, flops=4)

    def check(result: object) -> str | None:
        return None if result == 2 else f"{result} is not 2"

    race("sum", "ones", implementations, check, work, fields=fields or {})
    return {row.implementation: row for row in reported}


@pytest.mark.parametrize("short", [False, True])
def test_implementations_are_timed_in_turns(short: bool):
    """A short call is timed after one of its own kind that does not count."""
    order: list[str] = []

    def called(name: str) -> Callable[[], int]:
        return lambda: (order.append(name), 2)[1]

    calls = {name: called(name) for name in ("dlmone_fast torch", "a", "b")}
    rows = run(calls, short_seconds=float("inf") if short else 0.0)
    assert {row.samples for row in rows.values()} == {200}
    assert rows["dlmone_fast torch"].ours
    assert not rows["a"].ours
    turn = [name for name in ("a", "b", "dlmone_fast torch") for _ in range(1 + short)]
    assert order[6 : 6 + 200 * len(turn)] == turn * 200


def test_wrong_and_failing_peers_are_reported_and_not_timed():
    def fails() -> int:
        raise RuntimeError("no such device\nmore")

    rows = run({"dlmone_fast torch": lambda: 2, "wrong": lambda: 3, "fails": fails})
    assert rows["wrong"].median_ms is None
    assert rows["wrong"].note == "wrong, so not timed: 3 is not 2"
    assert rows["fails"].note == "failed: RuntimeError: no such device"
    assert rows["dlmone_fast torch"].median_ms is not None


def test_a_wrong_result_of_ours_fails():
    with pytest.raises(pytest.fail.Exception, match="3 is not 2"):
        run({"dlmone_fast torch": lambda: 3})


def test_a_percentile_is_a_value_that_was_measured():
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert percentile(range(200, 0, -1), 99) == 198
    assert percentile(range(100), 99) == 98
    row = run({"dlmone_fast torch": lambda: 2})["dlmone_fast torch"]
    assert row.min_ms <= row.median_ms <= row.p99_ms


def test_what_is_known_of_an_implementation_stands_in_its_row():
    fields = {"a": {"agreement": 0.5, "part": "network"}, "b": {"note": "absent: not installed"}}
    rows = run({"dlmone_fast torch": lambda: 2, "a": lambda: 2}, fields)
    assert rows["a"].agreement == 0.5
    # The work and the memory are the whole's.
    assert (rows["a"].teraflops, rows["a"].peak_bytes) == (None, None)
    assert rows["a"].median_ms is not None
    assert rows["b"].note == "absent: not installed"
    assert rows["b"].median_ms is None


def test_own_backends_are_those_that_run_here():
    from dlmone_fast.kernels.nearest_token import nearest_token

    x, table = torch.eye(3), torch.eye(3)
    found = ours("nearest_token", lambda name: nearest_token(x, table, kernel_backend=name))
    assert "dlmone_fast torch" in found
    assert "dlmone_fast cuda" not in found
    for call in found.values():
        assert call().tolist() == [0, 1, 2]


def test_peak_memory_sees_temporaries_and_the_result():
    def temporary() -> torch.Tensor:
        large = torch.ones(32 << 20, dtype=torch.uint8)
        return large[: 8 << 20].clone()

    peak = peak_memory(temporary, CPU)
    if peak is None:
        pytest.skip("the kernel keeps no record of resident memory")
    assert 39 << 20 <= peak <= 48 << 20
    assert (peak_memory(lambda: None, CPU) or 0) < 4 << 20
