"""Any number of prompts: a window at a time, in order, with the answers of a list."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import tiny

from dlmone_fast.errors import PromptError, UsageError
from dlmone_fast.runtime.streaming import WINDOW_BATCHES


def test_answers_come_in_order_and_are_those_of_a_list():
    generator = tiny.generator()
    prompts = tiny.prompts(3 * WINDOW_BATCHES * 2 + 5)
    streamed = list(generator.generate_iter(iter(prompts), batch_size=2, seed=9))
    assert streamed == generator.generate(prompts, seed=9)
    assert list(generator.generate_iter([])) == []


def test_only_a_window_is_read_ahead():
    taken = itertools.count()

    def endless() -> Iterator[str]:
        while True:
            next(taken)
            yield "ba"

    answers = tiny.generator().generate_iter(endless(), batch_size=2)
    assert [len(next(answers)) > 0 for _ in range(3)] == [True] * 3
    assert next(taken) == 2 * WINDOW_BATCHES


def test_prompts_of_one_length_share_a_batch():
    generator = tiny.generator()
    seen: list[list[int]] = []
    ids = generator._executor.ids

    def watched(rows, *rest):  # type: ignore[no-untyped-def]
        seen.append((rows.mask == 0).sum(1).tolist())
        return ids(rows, *rest)

    generator._executor.ids = watched  # type: ignore[method-assign]
    list(generator.generate_iter(["ba", "ba be bi bo", "be", "ba be bi bo"], batch_size=2))
    assert [len(set(batch)) for batch in seen] == [1, 1]


def test_further_arguments_pass_through_and_those_that_cannot_are_refused():
    generator = tiny.generator()
    prompts = tiny.prompts(3)
    several = list(generator.generate_iter(prompts, num_candidates=2))
    assert several == generator.generate(prompts, num_candidates=2)
    with pytest.raises(UsageError, match="return_dict"):
        generator.generate_iter(prompts, return_dict=True)
    with pytest.raises(UsageError, match="seed must be a whole number"):
        generator.generate_iter(prompts, seed=[1, 2, 3])  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [None, 7, "\ud800", "ba " * 100])
def test_a_bad_prompt_is_named_by_its_place_in_the_input(bad: object):
    prompts = [*tiny.prompts(2 * WINDOW_BATCHES + 3), bad]
    generator = tiny.generator()
    answers = generator.generate_iter(prompts, batch_size=2)  # type: ignore[arg-type]
    good = list(itertools.islice(answers, 2 * WINDOW_BATCHES))
    assert len(good) == 2 * WINDOW_BATCHES
    # Nothing of a window with a bad prompt runs, not even to find it.
    generator._executor.ids = None  # type: ignore[assignment, method-assign]
    with pytest.raises(PromptError, match=rf"prompts\[{len(prompts) - 1}\]"):
        next(answers)


def test_arguments_are_checked_before_anything_is_read():
    with pytest.raises(UsageError, match="batch_size"):
        tiny.generator().generate_iter(iter(["ba"]), batch_size=0)
