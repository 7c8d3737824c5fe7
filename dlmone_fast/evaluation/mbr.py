"""Minimum Bayes risk selection: keep the candidate that agrees most with the others.

It compares candidates with one another and never sees a reference (DiffuSeq section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlmone_fast.arguments import refuse_one
from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.bleu import pairwise_bleu, profile_tokens


def best_agreement(scores: Sequence[Sequence[float]]) -> int:
    """Row with the largest sum of a [n, n] matrix of `pairwise_bleu`; the first one of equals."""
    # numpy's summation order, so that near-ties fall as they do in DiffuSeq's own evaluation.
    return int(np.argmax(np.sum(np.asarray(scores, dtype=np.float64), axis=-1)))


def select_mbr(candidates: Sequence[str]) -> int:
    """Index of the candidate with the largest summed BLEU against the other candidates.

    Raises `UsageError` when there is no candidate.
    """
    refuse_one("candidates", candidates)
    if not candidates:
        raise UsageError(
            "candidates: MBR selection needs at least 1 candidate, got 0; "
            "generate with num_candidates >= 1."
        )
    return best_agreement(pairwise_bleu([profile_tokens(text.split()) for text in candidates]))
