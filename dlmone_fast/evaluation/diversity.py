"""How varied a text and a set of candidates are: Dist-1, Div-4, self-BLEU, repeats."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dlmone_fast.arguments import refuse_one
from dlmone_fast.evaluation.bleu import distinct_share, pairwise_bleu, profile_tokens


def dist_1(text: str) -> float:
    """Distinct over total words of one sentence, in [0, 1]; 0 when it is empty."""
    return distinct_share([text.split()], 1)


def div_4(candidates: Sequence[str]) -> float:
    """Distinct over total 4-grams, pooled over one source's candidates; 0 when there are none."""
    refuse_one("candidates", candidates)
    return distinct_share([text.split() for text in candidates], 4)


def upper_triangle_mean(scores: Sequence[Sequence[float]]) -> float:
    """Mean of the entries i < j of a square matrix with two rows or more."""
    above = [value for i, row in enumerate(scores) for value in row[i + 1 :]]
    return sum(above) / len(above)


def self_bleu(candidates: Sequence[str]) -> float:
    """Mean BLEU of candidate i (hypothesis) against candidate j (reference) over pairs i < j.

    DiffuSeq's variant: one direction of each pair only. Needs two candidates or more.
    """
    refuse_one("candidates", candidates)
    profiles = [profile_tokens(text.split()) for text in candidates]
    return upper_triangle_mean(pairwise_bleu(profiles))


def adjacent_repeats(tokens: Sequence[str]) -> int:
    """Number of neighbouring token pairs in which both tokens are the same."""
    return sum(first == second for first, second in pairwise(tokens))
