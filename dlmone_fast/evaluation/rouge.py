"""ROUGE-L as torchmetrics computes it with its defaults, the scorer DiffuSeq uses."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")


def rouge_tokens(text: str) -> list[str]:
    """Lower-case, read everything outside [a-z0-9] as a space, split; no stemming."""
    return _NOT_ALPHANUMERIC.sub(" ", text.lower()).split()


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence of two token lists.

    Bit-parallel (Hyyro 2004): one word of len(first) bits holds a row of the dynamic
    programme, so a sentence pair costs len(second) integer operations.
    """
    positions: dict[str, int] = {}
    for place, token in enumerate(first):
        positions[token] = positions.get(token, 0) | (1 << place)
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        hits = row & positions.get(token, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(first) - row.bit_count()


def rouge_l_of_tokens(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-L F1 of two `rouge_tokens` lists, in [0, 1]; 0 when either is empty."""
    common = longest_common_subsequence(reference, hypothesis)
    if common == 0:
        return 0.0
    precision, recall = common / len(hypothesis), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def rouge_l(hypothesis: str, reference: str) -> float:
    """ROUGE-L F1 of two strings, in [0, 1]; 0 when either has no token."""
    return rouge_l_of_tokens(rouge_tokens(hypothesis), rouge_tokens(reference))
