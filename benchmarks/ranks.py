"""Training on several processes, `python -m benchmarks.ranks`: measured on two, computed for more.

Times updates of teacher, score estimator and generator (12 M parameters) in one process and in two
that torchrun starts, one thread each, counts the bytes that they exchange, and puts the tables into
docs/scaling.md, between its marks. Takes eight minutes on 2 idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import records
from benchmarks.harness.sections import replace_section, where_measured
from benchmarks.training.cases import STEPS
from benchmarks.training.ranks_model import GPUS, TASKS, Machine, works
from dlmone_fast.cli import run_command
from dlmone_fast.errors import DlmOneError
from dlmone_fast.evaluation.table import Table
from dlmone_fast.release.environment import environment

PAGE = records.ROOT / "docs" / "scaling.md"
ROWS = 16
UPDATES, ROUNDS = 4, 3
# Processes and rows of a batch: alone, the same batch shared, a batch of twice the size.
_RUNS = ((1, ROWS), (2, ROWS), (2, 2 * ROWS))

Found = dict[str, dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, compute, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--updates", type=int, default=UPDATES, help="timed updates a run")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each kind, by turns")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave the page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    measured = _measured(options.updates, options.rounds)
    where = environment(torch.device("cpu"), load)
    sections = {
        "ranks": f"{where_measured(where)}\n\n{measured_table(measured).markdown()}",
        "plan": plan_table(Machine()).markdown(),
    }
    for name, text in sections.items():
        if not options.dry_run:
            replace_section(PAGE, name, text)
        print(text, end="\n\n")
    return 0


def _measured(updates: int, rounds: int) -> dict[tuple[int, int], Found]:
    """Seconds of every round, and bytes that an update sends, for each kind of run."""
    found: dict[tuple[int, int], Found] = {}
    for number in range(rounds):
        for processes, rows in _RUNS:
            print(f"round {number + 1}: {processes} processes, {rows} rows", file=sys.stderr)
            for step, values in _run(processes, rows, updates).items():
                kept = found.setdefault((processes, rows), {}).setdefault(step, values)
                if kept is not values:
                    kept["seconds"] += values["seconds"]
    return found


def _run(processes: int, rows: int, updates: int) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={processes}", "-m", "benchmarks.training.ranks_worker",
                   folder, str(rows), str(updates)]  # fmt: skip
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=records.ROOT,
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise DlmOneError(f"{' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
        path = Path(folder) / f"{processes}-{rows}.json"
        found: Found = json.loads(path.read_text(encoding="utf-8"))
        return found


def measured_table(found: dict[tuple[int, int], Found]) -> Table:
    """A line a step: medians, efficiencies, bytes."""
    table = Table([
        "update", f"1 process, {ROWS} rows", f"2 processes, {ROWS} rows", "efficiency",
        f"2 processes, {2 * ROWS} rows", "efficiency", "sent by a process", "collectives",
    ])  # fmt: skip
    for step in STEPS:
        one, shared, twice = (statistics.median(found[run][step]["seconds"]) for run in _RUNS)
        sent = found[_RUNS[1]][step]
        table.add(
            step, f"{one:.2f} s", f"{shared:.2f} s", f"{one / (2 * shared):.0%}", f"{twice:.2f} s",
            f"{one / twice:.0%}", f"{sent['bytes'] / 1e6:.1f} MB", f"{sent['calls']:.0f}",
        )  # fmt: skip
    return table


def plan_table(machine: Machine) -> Table:
    """A line a phase of Table 5's settings: ms an update on N GPUs, and hours and GPU hours."""
    table = Table([
        "setting", "phase", "updates × rows", "TFLOP", "MB sent",
        *(f"{n} GPU{'s' * (n > 1)}" for n in GPUS), "hours on 1, 8, 64", "GPU hours",
    ])  # fmt: skip
    for task in TASKS:
        for work in works(task):
            seconds = {n: machine.seconds(work, n) for n in GPUS}
            hours = {n: seconds[n] * work.updates / 3600 for n in (1, 8, 64)}
            table.add(
                task, work.phase, f"{work.updates:,} × {work.rows}", f"{work.flops / 1e12:.1f}",
                f"{work.sent / 1e6:.0f}", *(f"{1e3 * s:.0f}" for s in seconds.values()),
                ", ".join(f"{h:.1f}" for h in hours.values()),
                ", ".join(f"{n * h:.1f}" for n, h in hours.items()),
            )  # fmt: skip
    return table


if __name__ == "__main__":
    run_command(main)
