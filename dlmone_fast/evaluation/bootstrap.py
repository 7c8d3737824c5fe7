"""Paired bootstrap over sources (Koehn, EMNLP 2004), for anything that is a function of sums.

A resample draws n of n sources with replacement. Every score here depends on its sources only
through column sums (sentence scores, n-gram counts, lengths), so a resample is one weighted
sum: nothing is tokenised or counted again. The same (n, resamples, seed) draws the same
sources, which is what pairs two systems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dlmone_fast.checks import is_whole
from dlmone_fast.errors import UsageError

DEFAULT_RESAMPLES = 1000
MAX_RESAMPLES = 1_000_000
DEFAULT_LEVEL = 0.95
# Weights are built a block at a time: 64 resamples of 10,000 sources are 5 MB.
_BLOCK = 64

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """Score of the first system minus that of the second, over the same sources.

    `low` and `high` bound the difference; `p_value` is two-sided, for a difference of zero.
    """

    difference: float
    low: float
    high: float
    p_value: float


def check_resamples(resamples: int) -> None:
    """Raise `UsageError` unless 0 <= resamples <= 1,000,000."""
    if not is_whole(resamples, 0, MAX_RESAMPLES):
        raise UsageError(
            f"bootstrap: expected 0 (no intervals) to {MAX_RESAMPLES} resamples, got {resamples}."
        )


def resampled_sums(columns: Floats, resamples: int, seed: int) -> Floats:
    """Column sums [resamples, k] over bootstrap resamples of the n rows of `columns` [n, k]."""
    count = columns.shape[0]
    random = np.random.Generator(np.random.Philox(seed))
    sums = np.empty((resamples, columns.shape[1]))
    for start in range(0, resamples, _BLOCK):
        block = min(_BLOCK, resamples - start)
        drawn = random.integers(0, count, size=(block, count))
        drawn += np.arange(block)[:, None] * count
        weights = np.bincount(drawn.ravel(), minlength=block * count).reshape(block, count)
        sums[start : start + block] = weights @ columns
    return sums


def percentile_interval(samples: Floats, level: float = DEFAULT_LEVEL) -> tuple[float, float]:
    """The central `level` share of the samples."""
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(samples, [tail, 1.0 - tail])
    return float(low), float(high)


def mean_interval(
    values: Floats, *, resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of per-source scores `values` [n]."""
    return percentile_interval(resampled_sums(values[:, None], resamples, seed)[:, 0] / len(values))


def paired_difference(
    first: Floats,
    second: Floats,
    *,
    statistic: Callable[[Floats], Floats] | None = None,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
    level: float = DEFAULT_LEVEL,
) -> PairedDifference:
    """Compare two systems on the same sources.

    `first`, `second`: per-source scores [n], or sufficient statistics [n, k] together with
    `statistic`, which maps sums over the n sources [m, k] to scores [m] (for example
    `corpus_bleu_of_sums`). Without it the score is the mean. The p-value is twice the smaller
    share of resampled differences on one side of zero, counting the observation itself.
    """
    first, second = np.atleast_2d(first.T).T, np.atleast_2d(second.T).T
    if first.shape != second.shape or first.shape[0] == 0 or resamples < 1:
        raise UsageError(
            "paired_difference: expected two arrays of one shape [n] or [n, k] with n >= 1 and "
            f"resamples >= 1, got {first.shape} and {second.shape} with {resamples}."
        )
    count = first.shape[0]
    score = statistic or (lambda sums: sums[:, 0] / count)
    observed = float((score(first.sum(0)[None]) - score(second.sum(0)[None]))[0])
    drawn = score(resampled_sums(first, resamples, seed)) - score(
        resampled_sums(second, resamples, seed)
    )
    one_sided = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    low, high = percentile_interval(drawn, level)
    return PairedDifference(observed, low, high, min(1.0, 2 * (one_sided + 1) / (resamples + 1)))
