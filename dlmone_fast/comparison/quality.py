"""Scores of a list of candidates, by what the task can measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlmone_fast.data.rows import Row
from dlmone_fast.evaluation.bleu import Reference
from dlmone_fast.evaluation.bootstrap import mean_interval, percentile_interval, resampled_sums
from dlmone_fast.evaluation.pronunciation import score_pronunciations
from dlmone_fast.evaluation.scores import score_generations
from dlmone_fast.tasks import g2p, grammar


@dataclass(frozen=True)
class Metric:
    """A column: its title, and whether its 95 % interval is shown."""

    title: str
    name: str
    with_interval: bool = False

    def cell(self, scores: Mapping[str, Any], digits: int = 3) -> str | None:
        """The score and, where it is shown, half of its interval; None: it was not scored."""
        value = scores.get(self.name)
        if value is None:
            return None
        interval = scores.get("intervals", {}).get(self.name) if self.with_interval else None
        width = f" ±{(interval[1] - interval[0]) / 2:.{digits}f}" if interval else ""
        return f"{value:.{digits}f}{width}"


def normal_targets(rows: Sequence[Row], normalize_text: Callable[[str], str]) -> list[str]:
    """The target of each row as the models' tokenizer writes it."""
    return [normalize_text(row.trg) for row in rows]


def normal_references(rows: Sequence[Row], normalize_text: Callable[[str], str]) -> list[list[str]]:
    """All references of each row as the models' tokenizer writes them."""
    return [[normalize_text(text) for text in row.references] for row in rows]


def all_references(
    rows: Sequence[Row], normalize_text: Callable[[str], str]
) -> list[tuple[str, ...]]:
    """All references of each row, as they are."""
    return [row.references for row in rows]


@dataclass(frozen=True)
class Quality:
    """What a task reports.

    Attributes:
        metrics: columns.
        headline: the score that systems are compared by; more is better.
        tolerance: how near counts as equal.
        score: (sources, references, candidates, bootstrap) → scores.
        references: the target of each row, as a text of its own in the table.
        known: all that texts are scored against, from the rows and the models' way of writing.
        baselines: whether the source and the reference as output are rows of the table.
        note: a line below the table.
    """

    metrics: tuple[Metric, ...]
    headline: str
    tolerance: float
    score: Callable[[Sequence[str], Sequence[Any], list[list[str]], int], dict[str, object]]
    references: Callable[[Sequence[Row], Callable[[str], str]], Sequence[Any]] = normal_targets
    known: Callable[[Sequence[Row], Callable[[str], str]], Sequence[Any]] = normal_references
    baselines: bool = True
    note: str = ""


def grammar_scores(
    sources: Sequence[str],
    references: Sequence[Reference],
    candidates: list[list[str]],
    bootstrap: int,
) -> dict[str, object]:
    """Exact metrics of the embedded task, with bootstrap intervals over sources."""
    found = grammar.score(sources, candidates)
    scores: dict[str, object] = {k: v for k, v in found.items() if isinstance(v, float)}
    if not bootstrap:
        return scores
    per_sample = {name: np.array(rows, float) for name, rows in found["per_sample"].items()}
    valid = per_sample["valid"]
    scores["intervals"] = {
        "valid": mean_interval(valid.mean(1), resamples=bootstrap),
        "joint": mean_interval(per_sample["joint"].mean(1), resamples=bootstrap),
        "agreement": _ratio_interval((per_sample["agree"] * valid).sum(1), valid.sum(1), bootstrap),
    }
    if candidates and len(candidates[0]) > 1:
        both = np.array(found["per_source"]["both_registers"], float)
        scores["intervals"]["both_registers"] = mean_interval(both, resamples=bootstrap)  # type: ignore[index]
    else:
        scores["both_registers"] = None
    return scores


def text_scores(
    sources: Sequence[str],
    references: Sequence[Reference],
    candidates: list[list[str]],
    bootstrap: int,
) -> dict[str, object]:
    """The paper's metrics and the copy-aware ones."""
    columns = [list(column) for column in zip(*candidates, strict=True)]
    return score_generations(sources, references, columns, bootstrap=bootstrap)


def pronunciation_scores(
    sources: Sequence[str],
    references: Sequence[Sequence[str]],
    candidates: list[list[str]],
    bootstrap: int,
) -> dict[str, object]:
    """Word and phoneme error rates against all references of a word."""
    return score_pronunciations(references, candidates, bootstrap=bootstrap)


def quality_of(task: str) -> Quality:
    """What a task reports."""
    if task == g2p.TASK:
        return PRONUNCIATION
    return GRAMMAR if task.startswith("grammar") else TEXT


def _ratio_interval(parts: np.ndarray, wholes: np.ndarray, resamples: int) -> tuple[float, float]:
    sums = resampled_sums(np.stack([parts, wholes], axis=1).astype(float), resamples, 0)
    return percentile_interval(sums[:, 0] / np.maximum(sums[:, 1], 1))


GRAMMAR = Quality(
    (
        Metric("valid", "valid", True),
        Metric("slots", "slot_accuracy"),
        Metric("agreement", "agreement", True),
        Metric("joint", "joint", True),
        Metric("both registers", "both_registers"),
    ),
    "joint",
    0.02,
    grammar_scores,
)

TEXT = Quality(
    (
        Metric("BLEU", "bleu", True),
        Metric("source-BLEU", "source_bleu"),
        Metric("iBLEU", "ibleu", True),
        Metric("ROUGE-L", "rouge_l", True),
        Metric("Dist-1", "dist_1"),
        Metric("Div-4", "div_4"),
        Metric("self-BLEU", "self_bleu"),
        Metric("empty", "empty"),
        Metric("copies", "exact_copy"),
        Metric("[UNK]", "unknown"),
    ),
    "ibleu",
    0.01,
    text_scores,
)

PRONUNCIATION = Quality(
    (
        Metric("WER", "wer", True),
        Metric("PER", "per", True),
        Metric("oracle WER", "oracle_wer", True),
        Metric("distinct", "distinct"),
    ),
    "word_accuracy",
    0.01,
    pronunciation_scores,
    all_references,
    baselines=False,
    note="Oracle WER: words of which none of the candidates is right; distinct: different "
    "candidates of a word, the mean. Both need several (evaluation.candidates).",
)
