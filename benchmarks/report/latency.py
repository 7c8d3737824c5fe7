"""The latency study as tables: seconds per sample beside the paper's, and where a speed-up lies."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.generate import latency as study
from benchmarks.generate.targets import precision_of
from benchmarks.harness.race import OURS
from benchmarks.harness.records import Row
from benchmarks.report.tables import number
from dlmone_fast.evaluation.table import Table
from dlmone_fast.tasks.paper import TABLE_2


def latency(rows: Sequence[Row], case: str) -> str:
    """Seconds per sample by network calls, and ratios to the one-step student."""
    found = {row.implementation: row for row in rows if row.case == case}
    samplers = list(dict.fromkeys(system for system, _ in map(_split, found) if _sampled(system)))
    student = one_step(found)
    columns = ["network calls", "paper, RTX A5000", "its ratio"]
    for system in samplers:
        columns += [f"{system}, s", "p50", "p99", "runs", "× fastest 1-step"]
    table = Table(columns)
    for steps, published in TABLE_2.items():
        cells: list[object] = [steps, f"{published:.2f}", f"{published / TABLE_2[1]:.0f}×"]
        for system in samplers:
            cells += _cells(found.get(study.named(system, steps)), student)
        table.add(*cells)
    return f"{table.markdown()}\n\n{_students(found)}"


def _cells(row: Row | None, student: Row | None) -> list[object]:
    if row is None or row.mean_ms is None:
        return [None] * 5
    times = None
    if student is not None and student.mean_ms:
        times = f"{row.mean_ms / student.mean_ms:,.0f}×"
    return [
        f"{row.mean_ms / 1e3:.4g}{_mark(row)}",
        None if row.derived else _seconds(row.median_ms),
        _seconds(row.p99_ms),
        row.samples or None,
        times,
    ]


def _students(found: dict[str, Row]) -> str:
    """One step on every backend."""
    base = found.get(study.named(study.PUBLISHED, study.STEPS[-1]))
    columns = ["one step", "mean ms", "p50 ms", "p99 ms", "runs", "trained model's tokens",
               f"× {study.PUBLISHED}, {study.STEPS[-1]} steps"]  # fmt: skip
    table, absent = Table(columns), list[str]()
    for name, row in found.items():
        if row.at != 1:
            continue
        if row.mean_ms is None:
            absent.append(f"- {_split(name)[0]}: {row.note}")
            continue
        speed = None
        if base and base.mean_ms:
            speed = f"{base.mean_ms / row.mean_ms:,.0f}×{_mark(base)}"
        agreed = number(row.trained_agreement, ".2%")
        table.add(
            _split(name)[0], f"{row.mean_ms:.2f}", number(row.median_ms, ".2f"),
            number(row.p99_ms, ".2f"), row.samples, agreed, speed,
        )  # fmt: skip
    return "\n\n".join(filter(None, [table.markdown(), "\n".join(absent)]))


def decomposition(rows: Sequence[Row], case: str) -> str:
    """The factors between the published 2000-step sample and the fastest one-step call.

    Each line changes one thing and its factor is the quotient of two measured (or derived) means,
    so that the factors' product is the whole.
    """
    found = {row.implementation: row for row in rows if row.case == case}
    most = study.STEPS[-1]
    sampler = next((s for s, _ in map(_split, found) if s.startswith(study.SAMPLER)), "")
    students = [row for row in found.values() if _is_student(row) and row.mean_ms]
    plain = [row for row in students if _split(row.implementation)[0] == f"{OURS} eager fp32"]
    exact = [row for row in students if precision_of(_split(row.implementation)[0]) == "fp32"]
    chain = [
        ("", found.get(study.named(study.PUBLISHED, most))),
        ("our noise and rounding at every step", found.get(study.named(sampler, most))),
        (f"one network call instead of {most}", plain[0] if plain else None),
        ("the fastest fp32 engine", min(exact, key=_mean, default=None)),
        ("the fastest precision", min(students, key=_mean, default=None)),
    ]
    known = [(what, row) for what, row in chain if row is not None and row.mean_ms]
    if len(known) < 2 or known[0][0]:
        return ""
    table = Table(["change", "then", "mean ms", "factor"], "llrr")
    before = known[0][1]
    table.add("-", before.implementation, _milliseconds(before), None)
    for what, row in known[1:]:
        table.add(
            what, row.implementation, _milliseconds(row), f"{_mean(before) / _mean(row):,.2f}×"
        )
        before = row
    whole = _mean(known[0][1]) / _mean(before)
    table.add("together", None, None, f"{whole:,.0f}×")
    return table.markdown()


def one_step(found: dict[str, Row]) -> Row | None:
    """The fastest one-step student."""
    students = [row for row in found.values() if _is_student(row) and row.mean_ms]
    return min(students, key=_mean, default=None)


def _is_student(row: Row) -> bool:
    return row.at == 1 and row.ours and not _sampled(_split(row.implementation)[0])


def _sampled(system: str) -> bool:
    return system == study.PUBLISHED or system.startswith(study.SAMPLER)


def _split(implementation: str) -> tuple[str, str]:
    system, _, steps = implementation.rpartition(", ")
    return system, steps


def _mark(row: Row) -> str:
    return " (derived)" if row.derived else ""


def _milliseconds(row: Row) -> str:
    return f"{_mean(row):,.1f}{_mark(row)}"


def _mean(row: Row) -> float:
    return row.mean_ms or 0.0


def _seconds(milliseconds: float | None) -> str | None:
    return None if milliseconds is None else f"{milliseconds / 1e3:.4g}"
