from __future__ import annotations

import numpy as np
import pytest

from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.bootstrap import (
    mean_interval,
    paired_difference,
    percentile_interval,
    resampled_sums,
)
from dlmone_fast.evaluation.corpus_bleu import (
    corpus_bleu_of_sums,
    corpus_bleu_signature,
    corpus_bleu_statistics,
)


def scores(seed: int, count: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 0.2, count)


def test_interval_of_a_mean_has_the_closed_form_width() -> None:
    values = scores(1)
    low, high = mean_interval(values, resamples=4000, seed=0)
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.06)


def test_intervals_cover_the_true_mean() -> None:
    covered = 0
    for seed in range(200):
        low, high = mean_interval(scores(seed, 100), resamples=300, seed=seed)
        covered += low <= 0.3 <= high
    # 95 % of 200, four standard errors either way.
    assert 178 <= covered <= 200


def test_resamples_draw_rows_with_replacement_and_keep_their_number() -> None:
    ones_and_index = np.stack([np.ones(50), np.arange(50.0), np.arange(50.0) * 2], axis=1)
    sums = resampled_sums(ones_and_index, 130, seed=3)
    assert sums.shape == (130, 3)
    assert (sums[:, 0] == 50).all()
    np.testing.assert_allclose(sums[:, 2], 2 * sums[:, 1])
    assert len(np.unique(sums[:, 1])) > 100
    np.testing.assert_array_equal(sums, resampled_sums(ones_and_index, 130, seed=3))
    assert not np.array_equal(sums, resampled_sums(ones_and_index, 130, seed=4))


def test_paired_difference_sees_what_unpaired_intervals_hide() -> None:
    first = scores(7)
    second = first - 0.01 + np.random.default_rng(8).normal(0, 0.02, len(first))
    result = paired_difference(first, second)
    assert result.difference == pytest.approx(first.mean() - second.mean())
    assert 0.0 < result.low < result.difference < result.high < 0.02
    assert result.p_value < 0.01
    # Either interval alone reaches well past the other system's mean.
    assert mean_interval(first)[0] < second.mean()


def test_paired_difference_of_equal_systems_is_not_significant() -> None:
    values = scores(9)
    same = paired_difference(values, values)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    noise = np.random.default_rng(0).normal(0, 0.05, len(values))
    assert paired_difference(values, values + noise - noise.mean()).p_value > 0.5


def test_paired_difference_refuses_other_shapes() -> None:
    with pytest.raises(UsageError, match=r"\(400, 1\) and \(399, 1\)"):
        paired_difference(scores(1), scores(1, 399))


def test_corpus_bleu_of_summed_statistics_is_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    references = [
        "The kettle boils, at last.",
        "Nobody came to the party",
        "Why?",
        "Trains run late",
    ]
    hypotheses = ["the kettle boils at last .", "Nobody came to our party", "", "Trains run late"]
    statistics = corpus_bleu_statistics(hypotheses, references)
    expected = sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert corpus_bleu_of_sums(statistics.sum(0)[None])[0] == pytest.approx(expected, abs=1e-9)
    weights = np.array([2, 0, 1, 3])
    repeated = [text for text, times in zip(hypotheses, weights, strict=True) for _ in range(times)]
    matching = [text for text, times in zip(references, weights, strict=True) for _ in range(times)]
    expected = sacrebleu.corpus_bleu(repeated, [matching]).score
    assert corpus_bleu_of_sums((weights @ statistics)[None])[0] == pytest.approx(expected, abs=1e-9)
    assert corpus_bleu_signature().startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")


def test_corpus_bleu_can_be_compared_pairwise() -> None:
    references = [f"line {number} of the long and winding list" for number in range(40)]
    worse = [text.replace("winding", "twisted") for text in references]
    result = paired_difference(
        corpus_bleu_statistics(references, references),
        corpus_bleu_statistics(worse, references),
        statistic=corpus_bleu_of_sums,
        resamples=200,
    )
    assert result.difference > 10
    assert result.low > 0
    assert result.p_value < 0.02


def test_percentile_interval() -> None:
    assert percentile_interval(np.arange(101.0), level=0.9) == pytest.approx((5.0, 95.0))
