"""ROUGE-L: the original's numbers for Latin text, and real ones for what it cannot see."""

from __future__ import annotations

import pytest

from dlmone_fast.evaluation.rouge import rouge_l, rouge_tokeniser, rouge_tokens
from dlmone_fast.evaluation.scores import score_generations


@pytest.mark.parametrize(
    "text",
    [
        "我 爱 北 京",
        "Мама мыла раму",
        "मैं आज स्कूल जा",
        "ひらがな です",
        "مرحبا بالعالم",
        "😀 🎉",
        "?! …",
        "2019 年",
    ],
)
def test_identical_text_of_any_script_scores_one(text: str) -> None:
    assert rouge_l(text, text) == 1.0
    scores = score_generations([text], [text], [[text]], bootstrap=0)
    assert scores["rouge_l"] == 1.0


def test_other_text_of_any_script_scores_less() -> None:
    assert rouge_l("мама мыла", "Мама мыла раму") == pytest.approx(0.8)
    assert rouge_l("我 爱 你", "我 爱 北 京") == pytest.approx(4 / 7)
    assert rouge_l("папа", "мама") == 0.0
    # A year alone is what the original's tokeniser sees of these.
    assert rouge_l("2019 年", "2019 月") == 0.5
    # And a brand name of these.
    assert rouge_l("купил iPhone вчера", "продал iPhone сегодня") == pytest.approx(1 / 3)


def test_latin_text_is_scored_as_by_the_original() -> None:
    for reference in ("Isn't it 5,000?", "la forêt l'été", "the α value of x", "naïve café №5"):
        assert rouge_tokeniser([reference]) is rouge_tokens
    assert rouge_l("It is 5000 -- ok", "it's 5,000") == pytest.approx(2 / 8)
    assert rouge_tokens("Don't, la forêt_x!") == ["don", "t", "la", "for", "t", "x"]


def test_text_against_nothing_scores_zero() -> None:
    for pair in (("", ""), ("a", ""), ("", "a"), ("", "мама"), ("мама", "latin words")):
        assert rouge_l(*pair) == 0.0
    assert rouge_l("b", "a", "b c", "b") == 1.0
