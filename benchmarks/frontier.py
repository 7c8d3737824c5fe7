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
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.floors import measure_machine
from benchmarks.frontier_systems import System, affordable, systems
from benchmarks.quality_pairs import Pair, add_pair_options, open_pair
from benchmarks.quality_tables import QUALITY
from benchmarks.race import statistics_of
from benchmarks.records import Row, Score
from benchmarks.timing import Stopwatch
from dlmone_fast.cli import run_command
from dlmone_fast.comparison.measure import Measuring
from dlmone_fast.comparison.quality import Metric, Quality, grammar_scores, text_scores
from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.table import Table

BOOTSTRAP = 1000
_BATCH_SIZE = 64
_MOST_CANDIDATES = 64

TEXT_METRICS = (
    Metric("BLEU", "bleu", True),
    Metric("iBLEU", "ibleu", True),
    Metric("ROUGE-L", "rouge_l", True),
    Metric("Div-4", "div_4", True),
    Metric("source-BLEU", "source_bleu", True),
)
JOINT = Metric("joint", "joint", True)


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


def measure_pair(
    pair: Pair, options: argparse.Namespace, say: Callable[[str], None], timed: bool = True
) -> list[Row]:
    """A row for each system, then the source and the reference as output.

    Args:
        pair: teacher and student.
        options: rows, candidates, seed, full.
        say: called with a line before each measurement.
        timed: also measure milliseconds.
    """
    measuring = measuring_of(pair, options)
    measured = list(systems(pair, options.full))
    scored = []
    for system in measured:
        say(f"scoring {system.name}, {system.calls} calls")
        scored.append(_scored(measuring, system, options))
    rows = [
        replace(_row(pair, system), **scores)
        for system, scores in zip(measured, scored, strict=True)
    ]
    if timed:
        say("timing all of them in turns")
        seconds = measuring.latencies([(s.model, s.calls, s.sampler) for s in measured])
        rows = [
            replace(row, warmup=1, **statistics_of(times))
            for row, times in zip(rows, seconds, strict=True)
        ]
    for name, texts in (
        ("copy of the source", measuring.sources), ("reference", measuring.references)
    ):  # fmt: skip
        fields = score_fields(measuring, [[text] for text in texts])
        # One text a source has no diversity to be compared with that of several.
        del fields["scores"]["div_4"]
        note = "nothing to generate"
        rows.append(Row(f"{QUALITY}{pair.task}", name, "none", False, note=note, **fields))
    return rows


def measuring_of(pair: Pair, options: argparse.Namespace) -> Measuring:
    """The pair's test rows, and text metrics beside the exact score where the task has one."""
    quality = Quality(
        (*TEXT_METRICS, *([JOINT] if pair.is_grammar else [])),
        "joint" if pair.is_grammar else "ibleu",
        0.0,
        _joint_and_text_scores if pair.is_grammar else text_scores,
    )
    return Measuring(
        pair.rows(options.rows),
        quality,
        (pair.student if pair.student_folder else pair.teacher).normalize_text,
        seed=options.seed,
        batch_size=_BATCH_SIZE,
        bootstrap=BOOTSTRAP,
    )


def score_fields(measuring: Measuring, texts: list[list[str]]) -> dict[str, Any]:
    """The fields of a row that hold the scores of candidates [n][candidates]."""
    found = measuring.score_texts(texts)
    scores = {}
    for metric in measuring.quality.metrics:
        low, high = found["intervals"][metric.name]
        scores[metric.name] = Score(found[metric.name], low, high)
    return {"scores": scores, "rows_scored": sum(map(len, texts))}


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


def scoring_note(pair: Pair, options: argparse.Namespace) -> str:
    """How the texts were made and scored."""
    return (
        f"{pair.task}: {options.candidates} texts a source, seed {options.seed}; n: texts; ± half "
        "of the 95 % bootstrap interval over sources"
    )


def check_counts(options: argparse.Namespace) -> None:
    """Refuse numbers of rows and candidates, and seeds, that nothing can be measured with."""
    for name, low, high in (
        ("rows", 0, 1_000_000), ("candidates", 1, _MOST_CANDIDATES), ("seed", 0, (1 << 64) - 1)
    ):  # fmt: skip
        value = getattr(options, name)
        if not low <= value <= high:
            raise UsageError(f"--{name}: expected {low} to {high}, got {value}")


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


def _scored(measuring: Measuring, system: System, options: argparse.Namespace) -> dict[str, Any]:
    candidates = options.candidates
    rows = affordable(system.calls, len(measuring.rows), candidates, options.full)
    texts = measuring.texts(system.model, system.calls, system.sampler, rows, candidates)
    return score_fields(measuring, texts)


def _row(pair: Pair, system: System) -> Row:
    model = system.model.denoiser.config
    return Row(
        f"{QUALITY}{pair.task}",
        system.name,
        pair.implementation,
        True,
        at=system.calls,
        note=system.note,
        shape=f"1×{model.seq_len}×{model.embedding_dim}",
        dtype=system.model.precision,
    )


def _joint_and_text_scores(
    sources: Sequence[str], references: Sequence[str], candidates: list[list[str]], bootstrap: int
) -> dict[str, object]:
    scores = text_scores(sources, references, candidates, bootstrap)
    exact = grammar_scores(sources, references, candidates, bootstrap)
    both: dict[str, Any] = {**scores, JOINT.name: exact[JOINT.name]}
    intervals: Any = exact["intervals"]
    both["intervals"] = {**both["intervals"], JOINT.name: intervals[JOINT.name]}
    return both


def _heading(pair: Pair, options: argparse.Namespace) -> str:
    return (
        f"{scoring_note(pair, options)}. ms/sample: median of whole calls, text in to text out, "
        f"batch 1, {pair.implementation.removeprefix('dlmone_fast ')}, "
        f"{records.device_name(pair.student.device)}, torch {torch.__version__}."
    )


def _save(device: torch.device, rows: list[Row], load: float) -> Path:
    machine = measure_machine(device, records.device_name(device), Stopwatch(device))
    return records.save(records.record(device, machine.record(), rows, [], load))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    run_command(main)
