"""Measurements of the frontier: every system's scores, and its time in turns with the others."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.harness.race import statistics_of
from benchmarks.harness.records import Row, Score
from benchmarks.quality.pairs import Pair
from benchmarks.quality.systems import System, affordable, systems
from benchmarks.quality.tables import QUALITY
from dlmone_fast.comparison.measure import Measuring
from dlmone_fast.comparison.quality import Metric, Quality, grammar_scores, text_scores
from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.bleu import Reference

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


def scoring_note(pair: Pair, options: argparse.Namespace) -> str:
    """The note on how the texts were made and scored."""
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
    sources: Sequence[str],
    references: Sequence[Reference],
    candidates: list[list[str]],
    bootstrap: int,
) -> dict[str, object]:
    scores = text_scores(sources, references, candidates, bootstrap)
    exact = grammar_scores(sources, references, candidates, bootstrap)
    both: dict[str, Any] = {**scores, JOINT.name: exact[JOINT.name]}
    intervals: Any = exact["intervals"]
    both["intervals"] = {**both["intervals"], JOINT.name: intervals[JOINT.name]}
    return both
