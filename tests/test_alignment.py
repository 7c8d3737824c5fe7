"""Alignment of letters to symbols: what it learns, what it refuses, and that it is optimal."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest
from words import pairs, sounds

from dlmone_fast.alignment import (
    BLANK_LABEL,
    MAX_WORD,
    UNSEEN_COST,
    Alignment,
    label_symbols,
    learn_alignment,
)
from dlmone_fast.errors import DataError


@pytest.fixture(scope="module")
def learned() -> Alignment:
    return learn_alignment(pairs())


def test_it_finds_silent_letters_and_letters_of_two_sounds(learned: Alignment) -> None:
    assert learned.align("xabame", "k s ah b ah m") == ["k+s", "ah", "b", "ah", "m", "_"]
    assert learned.align("tabix", sounds("tabix")) == ["t", "ah", "b", "ih", "k+s"]
    hushed = learned.align("shabo", sounds("shabo"))
    assert hushed is not None
    assert sorted(hushed[:2]) == ["_", "sh"]
    assert hushed[2:] == ["ah", "b", "ow"]


def test_labels_spell_the_target_one_a_letter(learned: Alignment) -> None:
    every = pairs()
    for (word, target), labels in zip(
        every, learned.align_all([(w, t.split()) for w, t in every]), strict=True
    ):
        assert labels is not None
        assert len(labels) == len(word)
        assert [symbol for label in labels for symbol in label_symbols(label)] == target.split()


def test_many_at_once_are_aligned_as_one_by_one(learned: Alignment) -> None:
    some = [(w, t.split()) for w, t in pairs()[::7]] + [("zz", ["b"]), ("b", ["b", "b", "b"])]
    assert learned.align_all(some) == [learned.align(*pair) for pair in some]


def test_no_other_alignment_costs_less(learned: Alignment) -> None:
    for word, target in [*pairs()[::23], ("mat", "s ow"), ("xex", "k s"), ("shsh", "sh t")]:
        labels = learned.align(word, target)
        least = _least(learned, word, tuple(target.split()))
        assert (labels is None) == (least is None)
        if labels is not None:
            assert sum(map(_cost(learned), word, labels)) == least


@pytest.mark.parametrize(
    ("word", "target"),
    [
        ("b", "b ah t"),
        ("baq", "b ah t"),
        ("bat", "b ah zh"),
        ("", "b"),
        ("a" * (MAX_WORD + 1), "ah"),
    ],
)
def test_what_cannot_be_aligned_is_none(learned: Alignment, word: str, target: str) -> None:
    assert learned.align(word, target) is None


def test_a_word_without_any_symbol_is_all_blank(learned: Alignment) -> None:
    assert learned.align("ee", "") == [BLANK_LABEL, BLANK_LABEL]


def test_pairs_that_cannot_be_aligned_have_no_part_in_it(learned: Alignment) -> None:
    assert learn_alignment([*pairs(), ("w", "d ah b")]) == learned


def test_the_same_pairs_give_the_same_costs_in_every_process(learned: Alignment) -> None:
    code = (
        "from words import pairs; from dlmone_fast.alignment import learn_alignment\n"
        "print(learn_alignment(pairs()).costs)"
    )
    command = [sys.executable, "-c", code]
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(learned.costs)


@pytest.mark.parametrize("symbol", ["_", "k+s", "s" * 41])
def test_symbols_that_look_like_labels_are_refused(symbol: str) -> None:
    with pytest.raises(DataError, match="rename it"):
        learn_alignment([("ab", f"{symbol} b")])


def test_pairs_of_which_none_can_be_aligned_are_refused() -> None:
    with pytest.raises(DataError, match="none of 2 pairs can be aligned"):
        learn_alignment([("w", "d ah b"), ("q", "k y uw")])


def test_an_alphabet_too_large_is_refused() -> None:
    large = [(chr(0x4E00 + i), f"s{i} t{i}") for i in range(6000)]
    with pytest.raises(DataError, match="alignment is for small alphabets"):
        learn_alignment(large)


def _cost(alignment: Alignment):
    return lambda letter, label: alignment.costs[letter].get(label, UNSEEN_COST)


def _least(alignment: Alignment, word: str, target: tuple[str, ...]) -> int | None:
    """The least cost of any alignment, by trying all of them."""
    cost = _cost(alignment)

    @cache
    def rest(place: int, spoken: int) -> int | None:
        if place == len(word):
            return 0 if spoken == len(target) else None
        costs = []
        for count in (0, 1, 2):
            label = "+".join(target[spoken : spoken + count]) or BLANK_LABEL
            if label not in alignment.labels or spoken + count > len(target):
                continue
            after = rest(place + 1, spoken + count)
            if after is not None:
                costs.append(cost(word[place], label) + after)
        return min(costs, default=None)

    return rest(0, 0)
