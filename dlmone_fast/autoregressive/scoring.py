"""Scores of generated text: of pronunciations against all that are right, of text by BLEU."""

from __future__ import annotations

from collections.abc import Sequence

from dlmone_fast.data.rows import Row
from dlmone_fast.evaluation.scores import score_generations

_TEXT_SCORES = ("bleu", "source_bleu", "ibleu", "exact_copy", "repeat", "length_ratio")


def score_symbols(texts: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    """Word and symbol error rates of one text a row.

    wer: share of rows whose symbols are none of the row's references (`refs` and the target).
    per: edits to the closest reference, summed, over the summed lengths of those references.
    """
    wrong = edits = length = 0
    for text, row in zip(texts, rows, strict=True):
        symbols = text.split()
        distance, closest = min(
            (edit_distance(symbols, answer), len(answer)) for answer in answers_of(row)
        )
        wrong += distance > 0
        edits += distance
        length += closest
    return {"wer": wrong / len(rows), "per": edits / length}


def score_texts(
    texts: Sequence[str], sources: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """The project's scores of one text a source (`evaluation.scores`), without intervals."""
    scores = score_generations(sources, references, [list(texts)], bootstrap=0)
    return {name: float(scores[name]) for name in _TEXT_SCORES}


def answers_of(row: Row) -> list[list[str]]:
    """The right answers of a row, each once."""
    return [answer.split() for answer in dict.fromkeys((row.trg, *row.refs))]


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein's: the fewest insertions, deletions and substitutions from `a` to `b`."""
    if list(a) == list(b):
        return 0
    before = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        row = [i]
        for j, right in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (left != right)))
        before = row
    return before[-1]
