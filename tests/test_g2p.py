"""Scores of pronunciations, by hand and against slower ways to compute them."""

from __future__ import annotations

import random
from functools import cache

import pytest

from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.pronunciation import METRICS, score_pronunciations
from dlmone_fast.tasks.arpabet import IPA, from_ipa, to_ipa
from dlmone_fast.tasks.g2p import edit_distance, score

TOMATO = ["t ah m ey t ow", "t ah m aa t ow"]
CAT = ["k ae t"]


def test_right_means_equal_to_any_reference_in_any_case() -> None:
    scores = score([TOMATO, CAT], [["T AH M AA T OW"], ["k ah t"]])
    assert (scores["wer"], scores["word_accuracy"]) == (0.5, 0.5)
    assert scores["per"] == pytest.approx(1 / 9)
    assert (scores["oracle_wer"], scores["distinct"]) == (None, None)


def test_errors_are_counted_to_the_closest_reference_for_its_length() -> None:
    # Two edits from four phonemes are closer than two from three.
    scores = score([["a b c", "a b c d"]], [["a b x y"]])
    assert scores["per"] == pytest.approx(2 / 4)
    assert score([CAT], [[""]])["per"] == 1.0


def test_several_candidates() -> None:
    candidates = [["k ae t", "k  AE t", "k ah t"], ["t ow", "t ow", "t"]]
    scores = score([CAT, TOMATO], candidates)
    assert scores["wer"] == pytest.approx(4 / 6)
    assert scores["oracle_wer"] == 0.5
    assert scores["distinct"] == 2.0
    assert scores["per_source"] == {
        "wrong": [1, 3], "edits": [1, 4 + 4 + 5], "length": [9, 18], "missed": [0, 1],
        "distinct": [2, 2],
    }  # fmt: skip


def test_edit_distance_is_the_fewest_edits() -> None:
    @cache
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        same = slow(a[1:], b[1:]) + (a[0] != b[0])
        return min(same, slow(a[1:], b) + 1, slow(a, b[1:]) + 1)

    numbers = random.Random(0)
    for _ in range(300):
        a, b = ("".join(numbers.choices("xyz", k=numbers.randrange(7))) for _ in range(2))
        assert edit_distance(a, b) == slow(a, b)


def test_intervals_hold_the_scores_and_pair_systems() -> None:
    numbers = random.Random(1)
    references = [[" ".join(numbers.choices("abc", k=4))] for _ in range(200)]
    good = [[r[0], r[0] if i % 3 else "z"] for i, r in enumerate(references)]
    scores = score_pronunciations(references, good, bootstrap=200, seed=3)
    assert scores.keys() == {*METRICS, "intervals"}
    for name in METRICS:
        low, high = scores["intervals"][name]
        assert low <= scores[name] <= high
    assert scores["intervals"]["wer"][0] < scores["intervals"]["wer"][1]
    assert scores == score_pronunciations(references, good, bootstrap=200, seed=3)
    without = score_pronunciations(references, [row[:1] for row in good], bootstrap=10)
    assert without["intervals"].keys() == {"wer", "per", "word_accuracy"}
    assert score_pronunciations(references, good, bootstrap=0)["intervals"] == {}


@pytest.mark.parametrize(
    ("references", "candidates", "message"),
    [
        ([CAT], [], "for each of 1 words"),
        ([], [], "at least one"),
        ([CAT], [[]], r"candidates\[0\]: expected a non-empty list"),
        ([CAT], ["k ae t"], r"candidates\[0\]"),
        ([[]], [["k"]], r"references\[0\]"),
    ],
)
def test_lists_that_do_not_fit_are_refused(references, candidates, message) -> None:
    with pytest.raises(UsageError, match=message):
        score(references, candidates)


def test_every_phoneme_has_an_ipa_of_its_own_and_comes_back() -> None:
    assert len(IPA) == len(set(IPA.values())) == 39
    for phoneme, ipa in IPA.items():
        assert to_ipa(phoneme) == to_ipa(phoneme.lower()) == ipa
        assert from_ipa(ipa) == phoneme


def test_ipa_of_words() -> None:
    assert to_ipa("JH IY AA L AH JH AH S T") == "dʒiɑlʌdʒʌst"
    assert from_ipa("dʒiɑlʌdʒʌst") == "JH IY AA L AH JH AH S T"
    assert from_ipa("ˈtʃɔɪ s") == "CH OY S"
    assert from_ipa("tʃ") == "CH"
    assert to_ipa("T SH") == "tʃ"
    assert to_ipa("") == from_ipa("") == ""


def test_what_is_no_phoneme_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="phonemes: 'AH0' is none of CMUdict's 39"):
        to_ipa("K AH0 T")
    assert to_ipa("K [UNK] T", keep_unknown=True) == "k[UNK]t"
    with pytest.raises(UsageError, match="ipa: 'q', character 2"):
        from_ipa("kq")
