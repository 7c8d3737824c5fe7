"""The data behind the paper's figures 2, 3 and 4, as curves of quality."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.records import Score
from benchmarks.paper.lines import BOOTSTRAP, METRICS, evaluate, measured_note, teacher_sampling
from benchmarks.quality.curves import Figure, Point
from benchmarks.quality.frontier import JOINT, TEXT_METRICS, measure_pair, scoring_note
from benchmarks.quality.pairs import Pair
from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.bleu import pairwise_bleu, profile_tokens
from dlmone_fast.evaluation.bootstrap import Floats, mean_interval
from dlmone_fast.evaluation.generations import GenerationSet, read_generations
from dlmone_fast.evaluation.mbr import best_agreement
from dlmone_fast.evaluation.rows import COLUMNS, ScoredRows, score_rows
from dlmone_fast.runtime import Generator
from dlmone_fast.tasks import paper

CANDIDATES = 10
# Figures 2 and 4 plot the tables' metrics of single sentences.
SENTENCE_METRICS = METRICS[:4]
PLOTTED_OF_FRONTIER = tuple(m for m in TEXT_METRICS if m.name in ("bleu", "ibleu", "rouge_l"))

Say = Callable[[str], None]


def figure_2(pair: Pair, options: argparse.Namespace, say: Say) -> Figure:
    """MBR choices among the first 1 … 10 candidates, of teacher and student."""
    points: list[Point] = []
    copied: Mapping[str, Score] = {}
    for name, model, steps, sampler in _figure_2_systems(pair, options):
        say(f"generating {CANDIDATES} candidates a source: {name}, {steps} calls")
        texts = _candidates(pair, model, options, steps, sampler)
        points += _choices(name, texts, options)
        copied = copied or copy_scores(texts, options)
    title = f"{pair.task}: choice among candidates"
    published = published_points(paper.FIGURE_2, pair.task, "candidates")
    note = measured_note(options, CANDIDATES)
    axis = "MBR candidates"
    return Figure(title, axis, SENTENCE_METRICS, points, copied, False, published, note)


def figure_3(pair: Pair, options: argparse.Namespace, say: Say) -> Figure:
    """Quality against network calls: the frontier's measurements."""
    pair.check_vocabulary()
    rows = measure_pair(pair, options, say, timed=False)
    points = [
        Point(row.case, row.at, row.scores or {}, row.rows_scored) for row in rows if row.at
    ]  # fmt: skip
    copied = next(row.scores or {} for row in rows if row.case == "copy of the source")
    title = f"{pair.task}: quality against network calls"
    published = published_points(paper.TABLE_1 + paper.TABLE_4[1:], pair.task, "nfe")
    note = scoring_note(pair, options)
    metrics = (*PLOTTED_OF_FRONTIER, *([JOINT] if pair.is_grammar else []))
    return Figure(title, "NFE", metrics, points, copied, True, published, note)


def published_points(rows: tuple[paper.PaperRow, ...], task: str, abscissa: str) -> list[Point]:
    """Points that the paper's tables state of a task, a curve a model; empty for other tasks."""
    return [
        Point(
            f"paper: {row.system.partition(',')[0]}",
            float(getattr(row, abscissa)),
            {m.name: Score(getattr(row, m.name)) for m in METRICS},
            0,
        )
        for row in rows
        if row.task == task
    ]


def copy_scores(texts: GenerationSet, options: argparse.Namespace) -> dict[str, Score]:
    """Sentence scores of the source as output."""
    rows = _scored(texts, [texts.sources], options)
    return _scores(rows, np.zeros(len(texts.sources), dtype=np.int64), options.seed)


def sentence_scores(result: Mapping[str, Any]) -> dict[str, Score]:
    """The metrics of figures 2 and 4 in a result of `evaluate`."""
    return {
        metric.name: Score(result[metric.name], *result["intervals"][metric.name])
        for metric in SENTENCE_METRICS
        if result[metric.name] is not None
    }


def _figure_2_systems(
    pair: Pair, options: argparse.Namespace
) -> list[tuple[str, Generator, int, str | None]]:
    found: list[tuple[str, Generator, int, str | None]] = []
    if pair.teacher_folder:
        calls, sampler = teacher_sampling(pair, options)
        found.append((f"teacher, {sampler}", pair.teacher, calls, sampler))
    if pair.student_folder:
        found.append(("student", pair.student, 1, None))
    if not found:
        raise UsageError("--run: holds neither a teacher nor a student; train one first")
    return found


def _candidates(
    pair: Pair, model: Generator, options: argparse.Namespace, steps: int, sampler: str | None
) -> GenerationSet:
    """Texts as `evaluate_model` scores them, through the files that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        evaluate(
            pair, model, options, steps=steps, sampler=sampler, candidates=CANDIDATES,
            bootstrap=0, bertscore_model=None, generations_dir=folder,
        )  # fmt: skip
        names = (f"seed{options.seed}-candidate{i}.jsonl" for i in range(CANDIDATES))
        return read_generations([Path(folder) / name for name in names])


def _choices(name: str, texts: GenerationSet, options: argparse.Namespace) -> list[Point]:
    """A point for each number of candidates; everything is compared and scored once."""
    rows = _scored(texts, texts.candidates, options)
    agreements = [
        pairwise_bleu([profile_tokens(text.split()) for text in group])
        for group in zip(*texts.candidates, strict=True)
    ]
    points = []
    for k in range(1, len(texts.candidates) + 1):
        chosen = np.array(
            [best_agreement([row[:k] for row in matrix[:k]]) for matrix in agreements]
        )
        points.append(Point(name, k, _scores(rows, chosen, options.seed), len(texts.sources)))
    return points


def _scored(
    texts: GenerationSet, candidates: list[list[str]], options: argparse.Namespace
) -> ScoredRows:
    return score_rows(
        texts.sources,
        texts.refs,
        candidates,
        bertscore_model=options.bertscore_model,
        bertscore_layer=options.bertscore_layer,
    )


def _scores(rows: ScoredRows, chosen: np.ndarray, seed: int) -> dict[str, Score]:
    """Means over sources of the chosen candidates [n], with 95 % bootstrap intervals."""
    values: dict[str, Floats] = {
        metric.name: rows.sentences[:, :, COLUMNS.index(metric.name)]
        for metric in SENTENCE_METRICS
        if metric.name in COLUMNS
    }
    if rows.bertscore is not None:
        values["bertscore"] = rows.bertscore
    index = chosen[:, None]
    scores = {}
    for name, table in values.items():
        column = np.take_along_axis(table, index, axis=1)[:, 0]
        low, high = mean_interval(column, resamples=BOOTSTRAP, seed=seed)
        scores[name] = Score(float(column.mean()), low, high)
    return scores
