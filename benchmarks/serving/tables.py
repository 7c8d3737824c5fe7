"""The load tests' tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dlmone_fast.evaluation.table import Table

Run = Mapping[str, Any]
_NAMES = {"litserve": "LitServe", "ray": "Ray Serve"}


def load_table(runs: Sequence[Run]) -> Table:
    """A line for each run of LitServe's that was not an overload."""
    table = Table([
        "model", "requests", "connections", "requests/s", "bare generate()", "overhead",
        "p50 ms", "p99 ms", "CPU s: server", "bare", "client", "lost or swapped",
    ])  # fmt: skip
    for run in runs:
        if run["server"] == "litserve" and run["kind"] != "overload":
            whole = run["kind"] == "load"
            table.add(
                run["model"], f"{run['requests']:,}", run["clients"], f"{run['per_second']:,.1f}",
                f"{run['bare_per_second']:,.1f}" if whole else None,
                f"{overhead(run):.0%}" if whole else None, *_latency(run),
                f"{run['server_cpu']:,.1f}", f"{sum(run['bare']['cpu']):,.1f}" if whole else None,
                f"{run['client_cpu']:,.1f}", run["lost"] + run["wrong"],
            )  # fmt: skip
    return table


def overload_table(runs: Sequence[Run]) -> Table:
    """Answers and refusals of a server that accepts 32 requests and gets 128 connections."""
    table = Table([
        "requests", "connections", "answered", "p50 ms", "p99 ms", "refused with 429", "p50 ms",
        "p99 ms", "other", "lost or swapped",
    ])  # fmt: skip
    for run in runs:
        if run["kind"] == "overload":
            statuses = run["statuses"]
            table.add(
                f"{run['requests']:,}", run["clients"], f"{statuses.get('200', 0):,}",
                *_latency(run), f"{statuses.get('429', 0):,}", *_latency(run, "429"),
                sum(n for status, n in statuses.items() if status not in ("200", "429")),
                run["lost"] + run["wrong"],
            )  # fmt: skip
    return table


def comparison_table(runs: Sequence[Run], packages: Mapping[str, Mapping[str, float]]) -> Table:
    """A line for each server and kind of run."""
    table = Table([
        "server", "model", "connections", "requests/s", "overhead", "p50 ms", "p99 ms",
        "CPU s: server", "processes", "MB", "s to start", "packages", "MB on disk",
    ])  # fmt: skip
    for run in runs:
        if run["kind"] != "overload":
            brought = packages[run["server"]]
            table.add(
                _NAMES[run["server"]], run["model"], run["clients"], f"{run['per_second']:,.1f}",
                f"{overhead(run):.0%}" if run["kind"] == "load" else None, *_latency(run),
                f"{run['server_cpu']:,.1f}", run["processes"], f"{run['megabytes']:,.0f}",
                f"{run['start_seconds']:.1f}", int(brought["packages"]),
                f"{brought['megabytes']:,.0f}",
            )  # fmt: skip
    return table


def overhead(run: Run) -> float:
    """The share of the bare calls' throughput that serving costs: the median over the turns."""
    return statistics.median(run["bare"]["overheads"])


def _latency(run: Run, status: str = "200") -> tuple[str, str]:
    if status not in run["ms"]:
        return "-", "-"
    found = run["ms"][status]
    return f"{found['p50']:,.1f}", f"{found['p99']:,.1f}"
