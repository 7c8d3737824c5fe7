"""The evaluation of a release on the test split: teacher, student, copy and reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlmone_fast.data.rows import Row, load_rows
from dlmone_fast.evaluation.run import evaluate_model
from dlmone_fast.evaluation.table import Table
from dlmone_fast.files import write_atomically
from dlmone_fast.models.manifest import MANIFEST_NAME, hash_file
from dlmone_fast.release.environment import environment
from dlmone_fast.release.temperature import OF_STUDENTS, OF_TEACHERS, Chosen, choose_temperature
from dlmone_fast.runtime import Generator, load_model
from dlmone_fast.tasks.paper import paper_rows
from dlmone_fast.training import RunResult

CANDIDATES = 10
"""Texts a source of the student, and of every MBR row, as the paper has it."""

STUDENT_STEPS = (1, 2, 4)
TEACHER_STEPS = (20, 50)
TEACHER_SAMPLER = "q-sampling"
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

Scored = dict[str, Any]
"""A row of the table: system, calls (None: nothing was generated), texts a source, sources, scores
by metric, and intervals."""


@dataclass(frozen=True)
class Budget:
    """The number of test rows to use; 0: all.

    Attributes:
        rows: of every system.
        mbr_rows: of the teacher's candidates.
    """

    rows: int = 0
    mbr_rows: int = 0


@dataclass(frozen=True)
class PhaseCost:
    """Updates, rows and minutes of one phase, over all slices that it was trained in."""

    phase: str
    updates: int
    samples: int
    minutes: float


@dataclass(frozen=True)
class _System:
    """A model and how it is called, for the first `rows` of the test split."""

    name: str
    model: Generator
    calls: int
    texts: int
    rows: Sequence[Row]
    sampler: str | None = None
    temperature: float | None = None


def evaluate_release(
    result: RunResult, student: Path, budget: Budget, say: Callable[[str], None]
) -> dict[str, Any]:
    """Score every system on the test split; returns the content of evaluation.json.

    Each system's rows are kept in the run's folder, so that an interrupted evaluation goes on.

    Args:
        result: a finished run.
        student: the model folder that is to be released.
        budget: how many rows.
        say: called with a line for each row.

    Raises:
        InterruptedAndSavedError: the run's time is up.
    """
    limit, seed = result.workspace.limit, result.workspace.config.seed
    kept = result.root / "evaluation" / hash_file(student / MANIFEST_NAME)[:16]
    kept.mkdir(parents=True, exist_ok=True)
    scored: list[Scored] = []
    for index, system in enumerate(_systems(result, student, budget, say)):
        file = kept / f"{index}-of-{len(system.rows)}-rows.json"
        if not file.exists():
            limit.check("the rest of the evaluation")
            text = json.dumps(_scored(system, seed), ensure_ascii=False, indent=1)
            write_atomically(file, [text.encode()])
            # From now on the time counts: this process has got on.
            limit.reached()
        rows = json.loads(file.read_text(encoding="utf-8"))
        say(f"{system.name}, {system.calls} calls: BLEU {rows[0]['scores']['bleu']:.4f}")
        scored += rows
    # Every system's rows end with those of the source and of the reference.
    baselines = ("copy", "reference")
    last = scored[-len(baselines) :]
    return {
        **environment(result.workspace.device),
        "seed": seed,
        "slices": slices(result.root),
        "cost": [asdict(cost) for cost in phase_costs(result.root)],
        "rows": [row for row in scored if row["system"] not in baselines] + last,
    }


def better_student(result: RunResult, say: Callable[[str], None]) -> tuple[str, float]:
    """The stage whose student is the better one in one call, and its temperature.

    Both are chosen on the validation split, each stage at its own best temperature.
    """
    chosen = {}
    for stage in ("stage1", "stage2"):
        say(f"{stage} on the validation split")
        chosen[stage] = _choose(
            result, result.workspace.model(stage), 1, None, OF_STUDENTS, True, say
        )
    # The second stage unless it is worse.
    best = max(("stage2", "stage1"), key=lambda stage: chosen[stage])
    return best, chosen[best].temperature


def teacher_temperature(result: RunResult, *, diverse: bool, say: Callable[[str], None]) -> float:
    """The teacher's best temperature on the validation split, at its fewest calls.

    One text is best as the likeliest one; of several that are alike none is better than another.

    Args:
        result: a finished run.
        diverse: whether several texts of a source are wanted.
        say: called with a line for each temperature that is measured.
    """
    assert result.teacher is not None
    chosen = _choose(
        result, result.teacher, TEACHER_STEPS[0], TEACHER_SAMPLER, OF_TEACHERS, diverse, say
    )
    return chosen.temperature


def phase_costs(run: Path) -> list[PhaseCost]:
    """Costs of the phases in `run`/metrics.jsonl, in the order of their first lines.

    Minutes are those of updates, validation and checkpoints; what a slice takes to start is not in
    them. Updates that were repeated after a resume count once, their rows and minutes twice.
    """
    costs: dict[str, PhaseCost] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = _parsed(line)
        if "seconds" not in record:
            continue
        phase = record["phase"]
        cost = costs.get(phase, PhaseCost(phase, 0, 0, 0.0))
        costs[phase] = PhaseCost(
            phase,
            max(cost.updates, record["step"]),
            cost.samples + record["rows"],
            cost.minutes + record["seconds"] / 60,
        )
    return list(costs.values())


def slices(run: Path) -> list[dict[str, Any]]:
    """Device and minutes of each process that worked on the run, itself not included."""
    file = run / "slices.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [record for record in map(_parsed, lines) if record]


def table(rows: Sequence[Scored], task: str) -> Table:
    """One line a row, the paper's below."""
    lines = Table(["system", "NFE", "texts", "sources", *(title for title, _, _ in COLUMNS)])
    for row in rows:
        cells = [_cell(row, name, interval) for _, name, interval in COLUMNS]
        lines.add(row["system"], row["calls"], row["texts"], row["sources"], *cells)
    for published in paper_rows(task, mbr=True):
        values = [getattr(published, name, None) for _, name, _ in COLUMNS]
        shown = [None if value is None else f"{value:.3f}" for value in values]
        mbr = f", MBR-{published.candidates}" if published.candidates > 1 else ""
        lines.add(f"{published.system}{mbr} (paper)", published.nfe, None, None, *shown)
    return lines


def _choose(
    result: RunResult,
    folder: Path,
    steps: int,
    sampler: str | None,
    temperatures: Sequence[float],
    diverse: bool,
    say: Callable[[str], None],
) -> Chosen:
    config = result.workspace.config
    rows = load_rows(result.workspace.data_dir, "valid", limit=config.distill.validation_rows)
    return choose_temperature(
        result.root / f"temperature-{folder.name}.json", _load(result, folder), rows,
        steps=steps, sampler=sampler, seed=config.seed,
        temperatures=temperatures, diverse=diverse, say=say,
    )  # fmt: skip


def _systems(
    result: RunResult, folder: Path, budget: Budget, say: Callable[[str], None]
) -> Iterator[_System]:
    rows = load_rows(result.workspace.data_dir, "test", limit=budget.rows or None)
    some = rows[: budget.mbr_rows or len(rows)]
    assert result.teacher is not None
    student, teacher = _load(result, folder), _load(result, result.teacher)
    few, sampler = TEACHER_STEPS[0], TEACHER_SAMPLER
    yield _System("teacher, ddim", teacher, few, 1, rows, "ddim", 1.0)
    say("teacher on the validation split")
    name = f"teacher, {sampler}, temperature "
    one, ten = (teacher_temperature(result, diverse=diverse, say=say) for diverse in (False, True))
    for calls in TEACHER_STEPS:
        yield _System(f"{name}{one:g}", teacher, calls, 1, rows, sampler, one)
    yield _System(f"{name}{ten:g}", teacher, few, CANDIDATES, some, sampler, ten)
    once = Generator(teacher.denoiser, student.tokenizer, student.settings, "fp32")
    yield _System("undistilled (θ = φ)", once, 1, 1, rows)
    for calls in STUDENT_STEPS:
        yield _System("student", student, calls, CANDIDATES, rows)


def _load(result: RunResult, folder: Path) -> Generator:
    # One engine for all: any of them runs it, teachers that read their estimates too.
    return load_model(folder, result.workspace.config.device, "fp32", backend="eager")


def _scored(system: _System, seed: int) -> list[Scored]:
    scores = evaluate_model(
        system.model, rows=list(system.rows), num_candidates=system.texts, mbr=system.texts > 1,
        steps=system.calls, sampler=system.sampler, temperature=system.temperature, seed=seed,
        batch_size=_BATCH_SIZE, progress=False,
    )  # fmt: skip
    sources = len(system.rows)
    scored = [_row(system.name, system.calls, system.texts, sources, scores)]
    if scores["mbr"]:
        name = f"{system.name}, MBR-{system.texts}"
        scored.append(_row(name, system.calls, 1, sources, scores["mbr"]))
    for name in ("copy", "reference"):
        scored.append(_row(name, None, 1, sources, scores["baselines"][name]))
    return scored


def _row(
    system: str, calls: int | None, texts: int, sources: int, scores: Mapping[str, Any]
) -> Scored:
    names = [name for _, name, _ in COLUMNS if name != "div_4" or texts > 1]
    return {
        "system": system, "calls": calls, "texts": texts, "sources": sources,
        "scores": {name: scores.get(name) for name in names},
        "intervals": {k: v for k, v in scores["intervals"].items() if k in names},
    }  # fmt: skip


def _cell(row: Scored, name: str, with_interval: bool) -> str | None:
    value = row["scores"].get(name)
    if value is None:
        return None
    low, high = row["intervals"].get(name, (value, value))
    return f"{value:.3f} ± {(high - low) / 2:.3f}" if with_interval else f"{value:.3f}"


def _parsed(line: str) -> dict[str, Any]:
    # A process that was killed may have left half a line.
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return record
