"""The paper's tables, each with our lines under the published ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from benchmarks.generate.latency import OPERATION
from benchmarks.harness import records
from benchmarks.paper.lines import (
    NOTHING_NAMED,
    Lines,
    evaluate,
    measured_note,
    named,
    require,
    teacher_sampling,
)
from benchmarks.quality.pairs import model_of, open_pair
from benchmarks.report.devices import Device, devices
from dlmone_fast.evaluation.table import Table
from dlmone_fast.models.devices import pick_device
from dlmone_fast.release.environment import device_name
from dlmone_fast.tasks import paper

MBR_CANDIDATES = 10
STUDENT_CALLS = (1, 2, 4)


def table_1(options: argparse.Namespace) -> str:
    """One sample per source: teacher and student."""
    return _of_systems(options, paper.TABLE_1, 0)


def table_6(options: argparse.Namespace) -> str:
    """The candidate of ten that agrees most with the others."""
    return _of_systems(options, paper.TABLE_6, MBR_CANDIDATES)


def table_2(options: argparse.Namespace) -> str:
    """Published seconds a sample beside this device's newest ones of each case."""
    name = device_name(pick_device(options.device))
    device = next((d for d in _devices() if d.title == name), None)
    found = [row for row in device.of(OPERATION) if row.mean_ms] if device else []
    table = Table(["NFE", "paper, s (RTX A5000)", "ours, s", "case", "implementation"], "rrrll")
    for calls, published in paper.TABLE_2.items():
        rows = [row for row in found if row.at == calls]
        for row in rows:
            mark = " (derived)" if row.derived else ""
            seconds = f"{(row.mean_ms or 0) / 1e3:.3g}{mark}"
            table.add(calls, f"{published:.2f}", seconds, row.case, row.implementation)
        if not rows:
            table.add(calls, f"{published:.2f}", None, None, None)
    if not found or device is None:
        note = f"ours: not run: no record of {name} holds latency rows; make bench measures them"
    else:
        caveats = {text for record in device.used if (text := records.caveat(record))}
        note = "; ".join([f"ours: {name}; mean of whole calls, batch 1", *sorted(caveats)])
    return f"{table.markdown()}\n\n{note}"


def _devices() -> list[Device]:
    return devices(records.RESULTS) if records.RESULTS.is_dir() else []


def table_3(options: argparse.Namespace) -> str:
    """The student of stage 1 against that of stage 2."""
    lines = _with_published(paper.TABLE_3)

    def measure() -> None:
        run = require(options, "run", "Table 3 compares the two stages of one run")
        pair = open_pair(options)
        result: dict[str, Any] = {}
        for stage in ("stage1", "stage2"):
            folder = model_of(run, stage)
            if folder is None:
                lines.note(f"ours, {stage}: not run: {run} holds no finished {stage}")
                continue
            result = evaluate(pair, pair.load(folder), options, steps=1)
            lines.ours(pair.task, f"student of stage {stage[-1]}", 1, result)
        if result:
            lines.baselines(pair.task, result)

    return _finished(lines, options, measure)


def table_4(options: argparse.Namespace) -> str:
    """More network calls with the one-step student."""
    lines = _with_published(paper.TABLE_4)

    def measure() -> None:
        pair = open_pair(options)
        for calls in STUDENT_CALLS:
            result = evaluate(pair, pair.student, options, steps=calls)
            lines.ours(pair.task, "student", calls, result)
        lines.baselines(pair.task, result)

    return _finished(lines, options, measure)


def _of_systems(
    options: argparse.Namespace, published: tuple[paper.PaperRow, ...], mbr: int
) -> str:  # fmt: skip
    lines = _with_published(published)

    more: dict[str, Any] = {"candidates": mbr, "mbr": True} if mbr else {}
    suffix = f", MBR-{mbr}" if mbr else ""

    def measure() -> None:
        pair = open_pair(options)
        results: list[dict[str, Any]] = []

        def teacher() -> None:
            calls, sampler = teacher_sampling(pair, options)
            results.append(
                evaluate(pair, pair.teacher, options, steps=calls, sampler=sampler, **more)
            )
            lines.ours(pair.task, f"teacher, {sampler}{suffix}", calls, _chosen(results[-1]))

        def student() -> None:
            results.append(evaluate(pair, pair.student, options, steps=1, **more))
            lines.ours(pair.task, f"student{suffix}", 1, _chosen(results[-1]))

        for kind, folder, run in (
            ("teacher", pair.teacher_folder, teacher), ("student", pair.student_folder, student)
        ):  # fmt: skip
            if folder is None:
                lines.note(f"ours, {kind}: not run: no {kind} is given")
            else:
                lines.attempt(f"ours, {kind}", run)
        if results:
            lines.baselines(pair.task, results[-1])

    return _finished(lines, options, measure, mbr)


def _chosen(result: dict[str, Any]) -> dict[str, Any]:
    """The scores of the MBR choice, with the diversity of all candidates, as Table 6 has them."""
    if result["mbr"] is None:
        return result
    spread = {name: result[name] for name in ("self_bleu", "div_4")}
    intervals = {name: result["intervals"][name] for name in spread}
    chosen = result["mbr"]
    return {
        **chosen, **spread, "run": result["run"], "intervals": {**chosen["intervals"], **intervals}
    }  # fmt: skip


def _with_published(rows: tuple[paper.PaperRow, ...]) -> Lines:
    lines = Lines()
    for row in rows:
        lines.published(row)
    return lines


def _finished(
    lines: Lines, options: argparse.Namespace, measure: Callable[[], None], candidates: int = 0
) -> str:
    if named(options):
        before = len(lines.table.rows)
        lines.attempt("ours", measure)
        if len(lines.table.rows) > before:
            lines.note(measured_note(options, candidates or options.candidates))
    else:
        lines.note(f"ours: not run: {NOTHING_NAMED}")
    return lines.text()
