"""The evaluation of a release on the test split: teacher, student, copy and reference."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.release_cost import phase_costs
from dlmone_fast.data.rows import Row, load_rows
from dlmone_fast.evaluation.run import evaluate_model
from dlmone_fast.evaluation.table import Table
from dlmone_fast.models.denoiser import denoiser_from_folder
from dlmone_fast.models.folder import load_folder
from dlmone_fast.runtime import Generator, load_model
from dlmone_fast.tasks.paper import paper_rows
from dlmone_fast.training import RunResult
from dlmone_fast.training.validation import generation_settings

CANDIDATES = 10
"""Texts a source of the student, and of every MBR row, as the paper has it."""

STUDENT_STEPS = (1, 2, 4)
TEACHER_STEPS = (20, 50)
_BATCH_SIZE = 256

# Title, metric, whether half of its interval is shown.
COLUMNS = (
    ("BLEU", "bleu", True),
    ("iBLEU", "ibleu", True),
    ("ROUGE-L", "rouge_l", True),
    ("source-BLEU", "source_bleu", False),
    ("Dist-1", "dist_1", False),
    ("self-BLEU", "self_bleu", False),
    ("Div-4", "div_4", False),
    ("empty", "empty", False),
    ("repeats", "repeat", False),
    ("copies", "exact_copy", False),
    ("length", "length_ratio", False),
)

Scores = Mapping[str, Any]


@dataclass(frozen=True)
class Budget:
    """How many test rows are used; 0: all.

    Attributes:
        rows: of every system with one text a source, and of the student.
        mbr_rows: of the teacher's candidates.
    """

    rows: int = 0
    mbr_rows: int = 0

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add what `of` reads."""
        for name, what in (("rows", "all systems"), ("mbr-rows", "the teacher's candidates")):
            parser.add_argument(
                f"--{name}", type=int, default=0, help=f"test rows of {what}; 0: all (default)"
            )

    @classmethod
    def of(cls, options: argparse.Namespace) -> Budget:
        """What the command line says."""
        return cls(options.rows, options.mbr_rows)


@dataclass(frozen=True)
class Evaluated:
    """One row of the table.

    Attributes:
        calls: network calls a text; None: nothing was generated.
        texts: texts a source.
        rows: sources.
        scores: what `evaluate_model` returns, or a part of it.
    """

    system: str
    calls: int | None
    texts: int
    rows: int
    scores: Scores


def evaluate_release(
    result: RunResult, student: Path, budget: Budget, say: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """Score every system on the test split.

    Args:
        result: a finished run.
        student: the model folder that is released.
        budget: how many rows.
        say: called with a line for each system.

    Returns:
        What evaluation.json holds, and its rows in Markdown.
    """
    found = []
    loaded = load_model(student, result.workspace.config.device, "fp32")
    for row in _systems(result, loaded, budget):
        found.append(row)
        say(f"{row.system}, {row.calls} calls: BLEU {row.scores['bleu']:.4f}")
    content = {
        **records.environment(torch.device(result.workspace.device)),
        "seed": result.workspace.config.seed,
        "cost": [asdict(cost) for cost in phase_costs(result.root)],
        "rows": [_plain(row) for row in found],
    }
    return content, table(found, result.workspace.config.data.task).markdown()


def better_student(result: RunResult, say: Callable[[str], None]) -> str:
    """The stage whose student has the higher iBLEU on the validation split, in one call."""
    workspace = result.workspace
    rows = load_rows(
        workspace.data_dir, "valid", limit=workspace.config.distill.validation_rows
    )  # fmt: skip
    scores = {}
    for stage in ("stage1", "stage2"):
        student = load_model(workspace.model(stage), workspace.config.device, "fp32")
        found = evaluate_model(
            student, rows=rows, num_candidates=4, seed=1, batch_size=_BATCH_SIZE, bootstrap=0,
            progress=False,
        )  # fmt: skip
        scores[stage] = found["ibleu"]
        say(f"{stage} on the validation split: iBLEU {found['ibleu']:.4f}")
    # The second stage unless it is worse.
    return max(("stage2", "stage1"), key=lambda stage: scores[stage])


def table(rows: list[Evaluated], task: str) -> Table:
    """One line a system, the paper's below."""
    found = Table(["system", "NFE", "texts", "sources", *(title for title, _, _ in COLUMNS)])
    for row in rows:
        cells = [
            None if name == "div_4" and row.texts == 1 else _cell(row.scores, name, interval)
            for _, name, interval in COLUMNS
        ]
        found.add(row.system, row.calls, row.texts, row.rows, *cells)
    for published in paper_rows(task, mbr=True):
        cells = [getattr(published, name, None) for _, name, _ in COLUMNS]
        shown = [None if value is None else f"{value:.3f}" for value in cells]
        mbr = f", MBR-{published.candidates}" if published.candidates > 1 else ""
        found.add(f"{published.system}{mbr} (paper)", published.nfe, None, None, *shown)
    return found


def _systems(result: RunResult, student: Generator, budget: Budget) -> Iterator[Evaluated]:
    rows = load_rows(result.workspace.data_dir, "test", limit=budget.rows)
    teacher = _teacher(result, student)
    for steps in TEACHER_STEPS:
        yield from _scored("teacher, ddim", teacher, rows, steps, 1, "ddim")
    some = rows[: budget.mbr_rows or len(rows)]
    yield from _scored("teacher, ddim", teacher, some, TEACHER_STEPS[0], CANDIDATES, "ddim")
    once = Generator(teacher.denoiser, student.tokenizer, student.settings, "fp32")
    yield from _scored("undistilled (θ = φ)", once, rows, 1, 1)
    for steps in STUDENT_STEPS:
        yield from _scored("student", student, rows, steps, CANDIDATES)
    baselines = evaluate_model(student, rows=rows, batch_size=_BATCH_SIZE, progress=False)
    for name in ("copy", "reference"):
        yield Evaluated(name, None, 1, len(rows), baselines["baselines"][name])


def _scored(
    name: str,
    model: Generator,
    rows: list[Row],
    steps: int,
    candidates: int,
    sampler: str | None = None,
) -> Iterator[Evaluated]:
    scores = evaluate_model(
        model, rows=rows, num_candidates=candidates, mbr=candidates > 1, steps=steps,
        sampler=sampler, batch_size=_BATCH_SIZE, progress=False,
    )  # fmt: skip
    yield Evaluated(name, steps, candidates, len(rows), scores)
    if scores["mbr"]:
        yield Evaluated(f"{name}, MBR-{candidates}", steps, 1, len(rows), scores["mbr"])


def _teacher(result: RunResult, student: Generator) -> Generator:
    assert result.teacher is not None
    denoiser = denoiser_from_folder(load_folder(result.teacher)).to(student.device)
    settings = generation_settings(result.workspace.config, "teacher")
    return Generator(denoiser, student.tokenizer, settings, "fp32")


def _cell(scores: Scores, name: str, with_interval: bool) -> str | None:
    value = scores.get(name)
    if value is None:
        return None
    low, high = scores["intervals"].get(name, (value, value))
    return f"{value:.3f} ± {(high - low) / 2:.3f}" if with_interval else f"{value:.3f}"


def _plain(row: Evaluated) -> dict[str, Any]:
    scores = {name: row.scores.get(name) for _, name, _ in COLUMNS}
    shown = {k: v for k, v in row.scores["intervals"].items() if k in scores}
    return {**asdict(row), "scores": {**scores, "intervals": shown}}
