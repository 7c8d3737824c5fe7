"""Quality against network calls and against seconds, of one trained pair.

    python -m benchmarks.frontier --run runs/demo
    python -m benchmarks.frontier --teacher T --student S --data-dir DATA --save-records

The teacher with the original strided sampler and with correct ones at 2 to 50 network calls, and
with its full chain; the undistilled teacher once at t_init; the student at 1, 2 and 4 calls; the
source and the reference as output. All run on one backend, are timed in turns, and are scored on
the same first rows of the test split with the same seeds; long samplers on fewer of them (column
n: texts).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import records
from benchmarks.harness.floors import measure_machine
from benchmarks.harness.records import Row
from benchmarks.harness.timing import Stopwatch
from benchmarks.quality.frontier import (
    JOINT,
    TEXT_METRICS,
    check_counts,
    measure_pair,
    scoring_note,
)
from benchmarks.quality.pairs import Pair, add_pair_options, open_pair
from dlmone_fast.cli import run_command
from dlmone_fast.evaluation.table import Table
from dlmone_fast.release.environment import device_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit code."""
    options = _parser().parse_args(arguments)
    check_counts(options)
    load = os.getloadavg()[0]
    pair = open_pair(options)
    pair.check_vocabulary()
    rows = measure_pair(pair, options, lambda line: print(line, file=sys.stderr))
    if options.save_records:
        print(f"record: {_save(pair.student.device, rows, load)}", file=sys.stderr)
    print(f"{_heading(pair, options)}\n\n{table(rows, pair.is_grammar).markdown()}")
    return 0


def table(rows: list[Row], with_joint: bool) -> Table:
    """Scores with half of their 95 % interval, and milliseconds a text."""
    metrics = (*TEXT_METRICS, *([JOINT] if with_joint else []))
    found = Table(["system", "NFE", "n", *(metric.title for metric in metrics), "ms/sample"])
    for row in rows:
        scores = row.scores or {}
        values: dict[str, Any] = {name: score.value for name, score in scores.items()}
        values["intervals"] = {name: (score.low, score.high) for name, score in scores.items()}
        nfe = None if row.at is None else f"{row.at:.0f}"
        time = None if row.median_ms is None else _number(row.median_ms)
        cells = [metric.cell(values) for metric in metrics]
        found.add(row.case, nfe, row.rows_scored, *cells, time)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pair_options(parser)
    add = parser.add_argument
    add("--rows", type=int, default=256, help="test rows; 0: all (default: %(default)s)")
    add("--candidates", type=int, default=3, help="texts a source (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the texts (default: %(default)s)")
    add("--full", action="store_true",
        help="also the published sampler at the calls of the paper's Table 2, and more rows for "
        "long samplers")  # fmt: skip
    add("--save-records", action="store_true",
        help="write benchmarks/results/<device>/<date>-<commit>.json")  # fmt: skip
    return parser


def _heading(pair: Pair, options: argparse.Namespace) -> str:
    return (
        f"{scoring_note(pair, options)}. ms/sample: median of whole calls, text in to text out, "
        f"batch 1, {pair.implementation.removeprefix('dlmone_fast ')}, "
        f"{device_name(pair.student.device)}, torch {torch.__version__}."
    )


def _save(device: torch.device, rows: list[Row], load: float) -> Path:
    machine = measure_machine(device, device_name(device), Stopwatch(device))
    return records.save(records.record(device, machine.record(), rows, [], load))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    run_command(main)
