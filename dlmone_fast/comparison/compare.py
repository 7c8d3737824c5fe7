"""Measure the systems of a run on its test split, side by side in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dlmone_fast.comparison.measure import Measuring
from dlmone_fast.comparison.quality import Quality, quality_of
from dlmone_fast.data.rows import load_rows
from dlmone_fast.evaluation.report import VOCABULARY_ROW
from dlmone_fast.evaluation.table import Table
from dlmone_fast.files import write_atomically
from dlmone_fast.models.denoiser import denoiser_from_folder
from dlmone_fast.models.folder import load_folder
from dlmone_fast.runtime import Generator, load_model
from dlmone_fast.tasks.paper import paper_rows
from dlmone_fast.training import RunResult
from dlmone_fast.training.validation import generation_settings
from dlmone_fast.training.workspace import writing

# Row-calls of the network that one teacher row may spend on quality: above it a source gets one
# candidate, and long samplers fewer sources.
_ROW_CALLS = 20_480
_FEWEST_ROWS = 24
_SEARCH_STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
_SEARCH_METHODS = ("ddim", "q-sampling", "dpm-solver++")
_SEARCH_ROWS = 128
_SEARCH_CANDIDATES = 4


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    system: str
    steps: int | None
    samples: int
    scores: dict[str, Any]
    seconds: float | None


class Comparison(Measuring):
    """The systems of a run, its test rows, and the task's measures."""

    def __init__(self, result: RunResult, say: Callable[[str], None]) -> None:
        workspace = result.workspace
        self.result, self.workspace, self.config, self.say = (
            result,
            workspace,
            workspace.config,
            say,
        )
        evaluation = self.config.evaluation
        self.candidates = evaluation.candidates
        # One backend for every system: the speed-ups are the method's alone.
        self.student = load_model(
            result.student,  # type: ignore[arg-type]
            self.config.device,
            backend="eager",
        )
        self.teacher = self._teacher()
        super().__init__(
            load_rows(workspace.data_dir, "test", limit=evaluation.rows),
            quality_of(self.config.data.task),
            self.student.normalize_text,
            seed=self.config.seed,
            batch_size=evaluation.batch_size,
            bootstrap=evaluation.bootstrap,
        )

    def _teacher(self) -> Generator | None:
        if self.result.teacher is None:
            return None
        denoiser = denoiser_from_folder(load_folder(self.result.teacher)).to(self.student.device)
        settings = generation_settings(self.config, "teacher")
        return Generator(denoiser, self.student.tokenizer, settings, self.student.precision)

    def undistilled(self) -> Generator:
        """θ = φ: the teacher called once at t_init, as the student is."""
        assert self.teacher is not None
        settings = self.student.settings
        return Generator(
            self.teacher.denoiser, self.student.tokenizer, settings, self.student.precision
        )

    def measure(
        self, system: str, model: Generator, steps: int, sampler: str | None = None
    ) -> Measured:
        """Quality on as many rows as the budget allows, and seconds a sample at batch 1."""
        self.say(f"measuring {system}, {steps} calls")
        rows, candidates = self._affordable(model, steps)
        scores = self.scores(model, steps, sampler, rows, candidates)
        seconds = self.latency(model, steps, sampler)
        return Measured(system, steps, rows * candidates, scores, seconds)

    def reference_rows(self) -> list[Measured]:
        """The source as output, the reference as output, and, where it is another text, what the
        vocabulary makes of the reference: the most that any model here can write. Nothing where
        the task has no such rows."""
        if not self.quality.baselines:
            return []
        outputs = {"copy of the source": self.sources, "reference": self.references}
        written = [self.student.through_vocabulary(row.trg) for row in self.rows]
        if written != self.references:
            outputs[VOCABULARY_ROW] = written
        return [
            Measured(name, None, len(texts), self.score_texts([[text] for text in texts]), None)
            for name, texts in outputs.items()
        ]

    def fewest_teacher_steps(self) -> Measured | None:
        """The teacher sampler with the fewest calls whose headline is not below the student's.

        Both are scored on the same rows, candidates and seeds.
        """
        assert self.teacher is not None
        candidates = min(_SEARCH_CANDIDATES, self.candidates)
        rows = min(_SEARCH_ROWS, len(self.rows))
        headline = self.quality.headline
        student = float(self.scores(self.student, 1, None, rows, candidates)[headline])
        for steps in _SEARCH_STEPS:
            self.say(f"searching the fewest-step teacher, {steps} calls")
            found = [
                (self.scores(self.teacher, steps, method, rows, candidates), method)
                for method in _SEARCH_METHODS
            ]
            scores, method = max(found, key=lambda pair: float(pair[0][headline]))
            if scores[headline] >= student - self.quality.tolerance:
                seconds = self.latency(self.teacher, steps, method)
                samples = rows * candidates
                return Measured(f"teacher, {method}", steps, samples, scores, seconds)
        return None

    def _affordable(self, model: Generator, steps: int) -> tuple[int, int]:
        """Rows and candidates for a quality measurement within the budget of row-calls."""
        evaluation = self.config.evaluation
        limit = evaluation.teacher_rows if model is self.teacher else evaluation.rows
        rows = min(limit, len(self.rows))
        samples = max(_FEWEST_ROWS, _ROW_CALLS // steps)
        if model is not self.teacher or rows * self.candidates <= samples:
            return rows, self.candidates
        return min(rows, samples), 1


def compare_run(result: RunResult, say: Callable[[str], None] | None = None) -> str:
    """Measure a finished run; returns the table as Markdown and writes `comparison.json`.

    Args:
        result: a run with a student; its teacher's rows need its teacher folder.
        say: called with a line before each measurement.
    """
    comparison = Comparison(result, say or (lambda _: None))
    measured = list(_systems(comparison))
    student = next(row for row in measured if row.system == "student" and row.steps == 1)
    fewest = None
    if comparison.teacher is not None:
        fewest = comparison.fewest_teacher_steps()
    _write(comparison, measured, fewest)
    return "\n\n".join(
        [_table(comparison, measured).markdown(), *_notes(comparison, measured, student, fewest)]
    )


def _systems(comparison: Comparison) -> Any:
    evaluation = comparison.config.evaluation
    total = comparison.student.denoiser.schedule.num_timesteps
    if comparison.teacher is not None:
        for steps in map(int, evaluation.teacher_steps.split()):
            method = "ancestral" if steps == total else "ddim"
            yield comparison.measure(f"teacher, {method}", comparison.teacher, steps, method)
        yield comparison.measure("undistilled (θ = φ)", comparison.undistilled(), 1)
    if comparison.workspace.finished("stage1") and comparison.workspace.finished("stage2"):
        first = load_model(
            comparison.workspace.model("stage1"), comparison.config.device, backend="eager"
        )
        yield comparison.measure("student of stage 1", first, 1)
    for steps in map(int, evaluation.student_steps.split()):
        yield comparison.measure("student", comparison.student, steps)
    yield from comparison.reference_rows()


def _table(comparison: Comparison, measured: list[Measured]) -> Table:
    metrics = comparison.quality.metrics
    table = Table(["system", "NFE", *(m.title for m in metrics), "n", "ms/sample", "speed-up"])
    base = _baseline(measured)
    for row in measured:
        cells = [metric.cell(row.scores) for metric in metrics]
        speed = None if row.seconds is None else _number(1000 * row.seconds)
        ratio = None if row.seconds is None or base is None else f"{_number(base / row.seconds)}×"
        table.add(row.system, row.steps, *cells, row.samples, speed, ratio)
    for published in paper_rows(comparison.config.data.task):
        found = [getattr(published, metric.name, None) for metric in metrics]
        cells = [None if value is None else f"{value:.3f}" for value in found]
        table.add(f"{published.system} (paper)", published.nfe, *cells, None, None, None)
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _baseline(measured: list[Measured]) -> float | None:
    slowest = [row for row in measured if row.system == "teacher, ancestral"]
    return slowest[0].seconds if slowest else None


def _notes(
    comparison: Comparison, measured: list[Measured], student: Measured, fewest: Measured | None
) -> list[str]:
    quality, device = comparison.quality, comparison.student.device
    notes = [
        f"± half of the 95 % bootstrap interval; ms/sample: median of whole calls, text in to text "
        f"out, batch 1, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{comparison.student.precision}."
    ]
    if quality.note:
        notes.append(quality.note)
    base, total = _baseline(measured), comparison.student.denoiser.schedule.num_timesteps
    if base is not None and student.seconds:
        notes.append(
            f"Speed-up of the one-step student over the {total}-step teacher: "
            f"{base / student.seconds:.0f}×."
        )
    notes.append(_honest_note(quality, student, fewest))
    folder = comparison.result.student
    notes.append(f"Use it: dlmone_fast.generate([…], model={str(folder)!r})")
    return notes


def _honest_note(quality: Quality, student: Measured, fewest: Measured | None) -> str:
    headline = quality.headline
    if fewest is None or not student.seconds or not fewest.seconds:
        most = _SEARCH_STEPS[-1]
        return f"No teacher sampler of up to {most} calls reached the student's {headline}."
    return (
        f"Speed-up over the fewest-step teacher that is not below the student's {headline} by "
        f"more than {quality.tolerance}: {fewest.seconds / student.seconds:.1f}× "
        f"({fewest.system}, {fewest.steps} calls, {headline} {fewest.scores[headline]:.3f} on "
        f"{fewest.samples} samples)."
    )


def _write(comparison: Comparison, measured: list[Measured], fewest: Measured | None) -> None:
    content = {
        "preset": comparison.config.preset,
        "seed": comparison.config.seed,
        "rows": [row.__dict__ for row in measured],
        "fewest_teacher_steps": fewest.__dict__ if fewest else None,
    }
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    path = comparison.result.root / "comparison.json"
    with writing(path):
        write_atomically(path, [text.encode()])
