from __future__ import annotations

import math
import random

import pytest

from dlmone_fast.evaluation.bleu import (
    bleu_from_matches,
    clipped_matches,
    distinct_share,
    pairwise_bleu,
    profile_tokens,
    sentence_bleu,
)


def test_identical_sentence_scores_one() -> None:
    text = "could you lend me a ladder"
    assert sentence_bleu(text, text) == pytest.approx(1.0)


def test_hand_computed_smoothing() -> None:
    # Matches 4 of 4 unigrams, 1 of 3 bigrams; orders 3 and 4 get ln 4 / 10 and ln 4 / 20.
    smoothed = [4 / 4, 1 / 3, math.log(4) / 10 / 2, math.log(4) / 20 / 1]
    expected = math.prod(smoothed) ** 0.25 * math.exp(1 - 5 / 4)
    assert sentence_bleu("red boats sail east", "the red boats east sail") == pytest.approx(
        expected
    )
    assert bleu_from_matches([4, 1, 0, 0], 4, 5) == pytest.approx(expected)
    # A hypothesis longer than its reference pays no brevity penalty.
    assert bleu_from_matches([4, 1, 0, 0], 4, 3) == pytest.approx(math.prod(smoothed) ** 0.25)


def test_two_token_identity_is_smoothed_below_one() -> None:
    smoothed = math.log(2) / 10 * math.log(2) / 20
    assert sentence_bleu("good day", "good day") == pytest.approx(smoothed**0.25)


def test_one_token_hypothesis_leaves_higher_orders_out() -> None:
    assert sentence_bleu("day", "day") == pytest.approx(1.0)
    assert sentence_bleu("day", "good day") == pytest.approx(math.exp(-1))
    assert sentence_bleu("night", "good day") == 0.0


@pytest.mark.parametrize(
    ("hypothesis", "reference"), [("", "a b"), ("  ", "a"), ("a b", ""), ("", "")]
)
def test_nothing_in_common_scores_zero(hypothesis: str, reference: str) -> None:
    assert sentence_bleu(hypothesis, reference) == 0.0


def test_repeated_words_are_clipped() -> None:
    profiles = [
        profile_tokens(["go", "go", "go", "stop"]),
        profile_tokens(["go", "go", "stop", "stop"]),
    ]
    assert clipped_matches(*profiles) == [3, 2, 1, 0]
    assert clipped_matches(*reversed(profiles)) == [3, 2, 1, 0]


def test_pairwise_is_the_sentence_score_of_each_ordered_pair() -> None:
    texts = ["a small dog barks", "a dog barks", "a small dog barks loudly", ""]
    scores = pairwise_bleu([profile_tokens(text.split()) for text in texts])
    for i, hypothesis in enumerate(texts):
        for j, reference in enumerate(texts):
            assert scores[i][j] == (0.0 if i == j else sentence_bleu(hypothesis, reference))


def test_distinct_share_pools() -> None:
    assert distinct_share([["a", "b", "c", "d", "e"], ["a", "b", "c", "d"]], 4) == 2 / 3
    assert distinct_share([["a", "b", "c"]], 4) == 0.0


def test_agrees_with_nltk_on_random_sentences() -> None:
    nltk = pytest.importorskip("nltk.translate.bleu_score", reason="nltk is not installed")
    smooth = nltk.SmoothingFunction().method4
    draw = random.Random(5)
    words = ["tea", "cup", "the", "a", "warm", "very", "mug", "of", "in"]
    for _ in range(1500):
        hypothesis = draw.choices(words, k=draw.randint(1, 14))
        reference = draw.choices(words, k=draw.randint(1, 14))
        if draw.random() < 0.2:
            reference = hypothesis[: draw.randint(1, len(hypothesis))]
        expected = nltk.sentence_bleu([reference], hypothesis, smoothing_function=smooth)
        # Bit equality: MBR sums must tie exactly where the original's do.
        assert sentence_bleu(" ".join(hypothesis), " ".join(reference)) == expected
