"""The task `g2p`: the phonemes of a word (grapheme to phoneme), and what its answers are worth.

A word may have several pronunciations, all of them references. Case does not matter.

wer          share of candidates that equal none of the word's references
word_accuracy   1 - wer
per          edit distance of the candidates to their closest reference, over the lengths of those
             references; closest is the smallest distance for its length
oracle_wer   share of words none of whose candidates equals a reference; None with one candidate
distinct     different candidates of a word, mean; None with one candidate
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dlmone_fast.errors import UsageError

TASK = "g2p"


@dataclass(frozen=True)
class Published:
    """Scores of a paper or a released system, as printed there; None: not printed."""

    system: str
    source: str
    wer: float
    per: float | None = None


# All of CMUdict without stress, autoregressive. PRONALSYL's split has 12,000 test words.
PUBLISHED = (
    Published("Transformer, taught by an ensemble", "arXiv 1904.03446", 0.1988, 0.046),
    Published("Transformer, 2 × 256", "g2p-seq2seq, PRONALSYL split", 0.202),
    Published("LSTM, 512", "g2p-seq2seq, PRONALSYL split", 0.233),
    Published("Phonetisaurus", "g2p-seq2seq, PRONALSYL split", 0.244),
)


def score(
    references: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Score `candidates[i]`, one or more pronunciations, against `references[i]`, all right ones.

    Both are phonemes separated by spaces.

    Returns:
        The scores above, `sources`, `samples`, and under `per_source` lists parallel to
        `candidates` of sums over a word's candidates: `wrong`, `edits`, `length` (of the closest
        references), `missed` (1: no candidate is right) and `distinct`. They are what a bootstrap
        by source draws from.

    Raises:
        UsageError: the lists do not fit together, or an entry is empty.
    """
    _check(references, candidates)
    rows = [_scored(*row) for row in zip(references, candidates, strict=True)]
    wrong, edits, length, missed, distinct = (list(column) for column in zip(*rows, strict=True))
    samples = sum(map(len, candidates))
    several = len(candidates[0]) > 1
    return {
        "wer": sum(wrong) / samples,
        "word_accuracy": 1 - sum(wrong) / samples,
        "per": sum(edits) / max(1, sum(length)),
        "oracle_wer": sum(missed) / len(rows) if several else None,
        "distinct": sum(distinct) / len(rows) if several else None,
        "sources": len(rows),
        "samples": samples,
        "per_source": {
            "wrong": wrong, "edits": edits, "length": length, "missed": missed,
            "distinct": distinct,
        },
    }  # fmt: skip


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn one sequence into the other."""
    row = list(range(len(second) + 1))
    for i, symbol in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            change = diagonal + (symbol != other)
            diagonal = row[j]
            row[j] = min(change, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def _scored(references: Sequence[str], candidates: Sequence[str]) -> tuple[int, ...]:
    """Sums of one word: wrong, edits, length, missed, distinct."""
    right = [reference.lower().split() for reference in references]
    spoken = [candidate.lower().split() for candidate in candidates]
    wrong = sum(phonemes not in right for phonemes in spoken)
    closest = [_closest(right, phonemes) for phonemes in spoken]
    edits, length = (sum(column) for column in zip(*closest, strict=True))
    return wrong, edits, length, int(wrong == len(spoken)), len(set(map(tuple, spoken)))


def _closest(references: list[list[str]], phonemes: list[str]) -> tuple[int, int]:
    """Edit distance to the closest reference, and that one's length."""
    if phonemes in references:
        return 0, len(phonemes)
    distances = ((edit_distance(phonemes, right), len(right)) for right in references)
    return min(distances, key=lambda pair: (pair[0] / max(1, pair[1]), pair[0]))


def _check(references: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]) -> None:
    if len(references) != len(candidates) or not candidates:
        raise UsageError(
            f"candidates: expected a list of pronunciations for each of {len(references)} words "
            f"(at least one), got {len(candidates)}"
        )
    for name, lists in (("references", references), ("candidates", candidates)):
        for i, texts in enumerate(lists):
            if isinstance(texts, str) or not texts:
                raise UsageError(
                    f"{name}[{i}]: expected a non-empty list of pronunciations, got {texts!r}"
                )
