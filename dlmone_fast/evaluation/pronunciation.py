"""Scores of pronunciations (`dlmone_fast.tasks.g2p`) with their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dlmone_fast.evaluation.bootstrap import (
    DEFAULT_RESAMPLES,
    check_resamples,
    percentile_interval,
    resampled_sums,
)
from dlmone_fast.tasks import g2p

METRICS = ("wer", "per", "oracle_wer", "word_accuracy", "distinct")


def score_pronunciations(
    references: Sequence[Sequence[str]],
    candidates: Sequence[Sequence[str]],
    *,
    bootstrap: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Score the candidates of n words.

    Args:
        references: all right pronunciations of each word.
        candidates: as many of each word.
        bootstrap: resamples of the words; 0: no intervals.
        seed: of the resamples.

    Returns:
        The keys of `METRICS` and `intervals` (metric → [low, high], 95 %).

    Raises:
        UsageError: the lists do not fit together, or `bootstrap` is out of range.
    """
    check_resamples(bootstrap)
    found = g2p.score(references, candidates)
    scores = {name: found[name] for name in METRICS}
    sums = found["per_source"]
    names = ("wrong", "edits", "length", "missed", "distinct")
    table = np.array([sums[name] for name in names], dtype=np.float64).T
    intervals: dict[str, list[float]] = {}
    if bootstrap:
        drawn = dict(zip(names, resampled_sums(table, bootstrap, seed).T, strict=True))
        samples, words = found["samples"], found["sources"]
        resamples = {
            "wer": drawn["wrong"] / samples,
            "per": drawn["edits"] / np.maximum(drawn["length"], 1),
            "oracle_wer": drawn["missed"] / words,
            "word_accuracy": 1 - drawn["wrong"] / samples,
            "distinct": drawn["distinct"] / words,
        }
        intervals = {
            name: list(percentile_interval(values))
            for name, values in resamples.items()
            if scores[name] is not None
        }
    return {**scores, "intervals": intervals}
