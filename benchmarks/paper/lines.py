"""Lines of a paper's table: the published ones, ours beneath them, and reasons for gaps."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.quality.pairs import Pair
from benchmarks.quality.systems import affordable
from dlmone_fast.comparison.quality import Metric
from dlmone_fast.errors import BackendUnavailableError, DataError, ModelFileError, UsageError
from dlmone_fast.evaluation.run import evaluate_model
from dlmone_fast.evaluation.table import Table
from dlmone_fast.runtime import Generator
from dlmone_fast.tasks.paper import PaperRow

METRICS = (
    Metric("BLEU", "bleu", True),
    Metric("ROUGE-L", "rouge_l", True),
    Metric("BERTScore", "bertscore", True),
    Metric("Dist-1", "dist_1", True),
    Metric("self-BLEU", "self_bleu", True),
    Metric("Div-4", "div_4", True),
)
BOOTSTRAP = 1000
_BATCH_SIZE = 64
_DIGITS = 4

# Errors for things that are missing here, not wrong in the command: the paper's row is printed
# without ours.
NOT_HERE = (BackendUnavailableError, DataError, ModelFileError)
NOTHING_NAMED = (
    "no model is named; give --run RUN, or --teacher and --student with --data-dir (--help)"
)


class Lines:
    """The lines of one table, and notes under it."""

    def __init__(self) -> None:
        titles = (metric.title for metric in METRICS)
        self.table = Table(["task", "system", "NFE", "n", *titles], "ll" + "r" * 8)
        self.notes: list[str] = []

    def published(self, row: PaperRow) -> None:
        """A row of the paper."""
        chosen = f", MBR-{row.candidates}" if row.candidates > 1 else ""
        self._add(row.task, f"paper: {row.system}{chosen}", row.nfe, None, asdict(row))

    def ours(self, task: str, system: str, nfe: int | None, result: Mapping[str, Any]) -> None:
        """A result of `evaluate`."""
        self._add(task, f"ours: {system}", nfe, result["run"]["rows"], result)

    def baselines(self, task: str, result: Mapping[str, Any]) -> None:
        """The source and the reference as output, of the rows of a result."""
        for name, title in (("copy", "copy of the source"), ("reference", "reference")):
            # One text a source has no diversity to be compared with that of several.
            scores = {**result["baselines"][name], "div_4": None}
            self._add(task, title, None, result["run"]["rows"], scores)

    def note(self, text: str) -> None:
        """A line under the table."""
        self.notes.append(text)

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Measure a line of ours, or say why it cannot be measured here."""
        try:
            measure()
        except NOT_HERE as error:
            self.note(f"{what}: not run: {error}")

    def text(self) -> str:
        """Table and notes."""
        return "\n\n".join(filter(None, [self.table.markdown(), "\n".join(self.notes)]))

    def _add(
        self, task: str, system: str, nfe: int | None, n: int | None, scores: Mapping[str, Any]
    ) -> None:
        self.table.add(task, system, nfe, n, *(m.cell(scores, _DIGITS) for m in METRICS))


def evaluate(
    pair: Pair,
    model: Generator,
    options: argparse.Namespace,
    *,
    steps: int,
    sampler: str | None = None,
    candidates: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Scores as DiffuSeq takes them: joint truncation, its decoding, its metrics.

    Args:
        pair: whose test rows are used: the first `options.rows`, and fewer for a long sampler
            unless `options.full`.
        steps, sampler: the network calls of each text.
        candidates: texts a source; None: `options.candidates`.
        more: further arguments of `evaluate_model`.
    """
    candidates = candidates or options.candidates
    rows = pair.rows(options.rows)
    if not options.full:
        rows = rows[: affordable(steps, len(rows), candidates, full=True)]
    return evaluate_model(
        model,
        rows=rows,
        num_candidates=candidates,
        steps=steps,
        sampler=sampler,
        seed=options.seed,
        batch_size=_BATCH_SIZE,
        joint_truncation=True,
        **{
            "bootstrap": BOOTSTRAP,
            "bertscore_model": options.bertscore_model,
            "bertscore_layer": options.bertscore_layer,
            **more,
        },
    )


def teacher_sampling(pair: Pair, options: argparse.Namespace) -> tuple[int, str]:
    """Network calls and sampler of the teacher: the full chain, as the paper's, by default."""
    total = pair.teacher.denoiser.schedule.num_timesteps
    return options.teacher_calls or total, options.teacher_sampler


def _bertscore_note(options: argparse.Namespace) -> str:
    if options.bertscore_model is None:
        return "BERTScore: not run: no local model given (--bertscore-model DIR)"
    return f"BERTScore: of {options.bertscore_model}"


def measured_note(options: argparse.Namespace, candidates: int) -> str:
    """The note on how our lines were made, and on BERTScore."""
    return (
        f"ours: DiffuSeq's joint truncation, decoding and metrics; {candidates} texts a source, "
        f"seed {options.seed}; n: sources, fewer for long samplers unless --full; ± half of the "
        f"95 % bootstrap interval over sources\n{_bertscore_note(options)}"
    )


def named(options: argparse.Namespace) -> bool:
    """True if the command names anything to measure."""
    return any((options.run, options.teacher, options.student, options.data_dir))


def require(options: argparse.Namespace, name: str, what: str) -> Any:
    """The value of an option that a measurement cannot do without."""
    value = getattr(options, name)
    if value is None:
        raise UsageError(f"--{name.replace('_', '-')} is missing: {what}")
    return value
