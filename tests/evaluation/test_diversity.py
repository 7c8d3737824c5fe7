from __future__ import annotations

import random

import pytest

from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.bleu import sentence_bleu
from dlmone_fast.evaluation.diversity import adjacent_repeats, dist_1, div_4, self_bleu
from dlmone_fast.evaluation.mbr import select_mbr
from dlmone_fast.evaluation.rouge import longest_common_subsequence, rouge_l, rouge_tokens


def lcs_by_table(first: list[str], second: list[str]) -> int:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            longest = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else longest
    return table[-1][-1]


def test_lcs_agrees_with_the_dynamic_programme() -> None:
    draw = random.Random(2)
    for _ in range(400):
        first = draw.choices("abcde", k=draw.randint(0, 90))
        second = draw.choices("abcdf", k=draw.randint(0, 40))
        assert longest_common_subsequence(first, second) == lcs_by_table(first, second)


def test_rouge_tokens_keep_ascii_letters_and_digits_only() -> None:
    assert rouge_tokens("Isn't it 5°C, Zoë?") == ["isn", "t", "it", "5", "c", "zo"]


def test_rouge_l_hand_computed() -> None:
    # Common: "the", "runs" of 3 and 4 tokens: F = 2 * 2 / (3 + 4).
    assert rouge_l("The horse runs!", "the grey mare runs") == pytest.approx(4 / 7)
    assert rouge_l("same words", "Same, words.") == 1.0
    assert rouge_l("", "words") == rouge_l("...", "words") == rouge_l("words", "?") == 0.0


def test_word_shares() -> None:
    assert dist_1("to be or not to be") == 4 / 6
    assert dist_1("  ") == 0.0
    assert div_4(["one two three four", "one two three four"]) == 0.5
    assert div_4(["one two three", ""]) == 0.0
    assert adjacent_repeats(["so", "so", "so", "long", "long", "ago"]) == 3


def test_self_bleu_takes_the_earlier_text_as_hypothesis() -> None:
    texts = ["rain falls on the roof", "rain falls on the old roof", "snow falls"]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = sum(sentence_bleu(texts[i], texts[j]) for i, j in pairs) / 3
    assert self_bleu(texts) == pytest.approx(expected)
    assert self_bleu(texts) != pytest.approx(self_bleu(texts[::-1]))


def test_mbr_takes_the_centre_and_the_first_of_equals() -> None:
    assert select_mbr(["blue sky above", "a fine blue sky today", "a fine blue sky now", "x"]) == 1
    assert select_mbr(["same text here now", "same text here now"]) == 0
    assert select_mbr(["p", "q", "r"]) == 0
    assert select_mbr(["only"]) == 0
    with pytest.raises(UsageError, match="at least 1 candidate"):
        select_mbr([])
