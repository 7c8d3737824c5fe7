"""Rows with scores as tables: quality beside network calls and time."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.records import Row, Score
from dlmone_fast.evaluation.table import Table

QUALITY = "quality: "
"""How operations of rows with scores begin; the task follows."""

TITLES = {
    "joint": "joint (exact)", "bleu": "BLEU", "ibleu": "iBLEU", "source_bleu": "source-BLEU",
    "rouge_l": "ROUGE-L", "bertscore": "BERTScore", "dist_1": "Dist-1", "self_bleu": "self-BLEU",
    "div_4": "Div-4",
}  # fmt: skip
"""Measures in the order of the columns."""


def quality(rows: Sequence[Row]) -> str:
    """A table for each task."""
    parts = []
    for operation in dict.fromkeys(row.operation for row in rows):
        found = [row for row in rows if row.operation == operation]
        parts.append(f"**{operation.removeprefix(QUALITY)}**\n\n{task(found)}")
    return "\n\n".join(parts)


def task(rows: Sequence[Row]) -> str:
    """One task's systems: scores ± half of the 95 % interval, samples, and time of one sample."""
    known = [name for name in TITLES if any(name in (row.scores or {}) for row in rows)]
    table = Table(["system", "NFE", *(TITLES[name] for name in known), "n", "ms/sample"])
    for row in rows:
        scores = row.scores or {}
        table.add(
            row.case,
            None if row.at is None else f"{row.at:g}",
            *(score(scores.get(name)) for name in known),
            row.rows_scored or None,
            None if row.median_ms is None else f"{row.median_ms:,.1f}",
        )
    notes = [f"- {row.case}: {row.note}" for row in rows if row.note]
    return "\n\n".join(filter(None, [table.markdown(), "\n".join(notes)]))


def score(found: Score | None) -> str | None:
    """A score with half the width of its interval."""
    if found is None:
        return None
    if found.low is None or found.high is None:
        return f"{found.value:.3f}"
    return f"{found.value:.3f} ±{(found.high - found.low) / 2:.3f}"
