"""Inputs larger than memory: a window at a time, similar lengths together, order kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from dlmone_fast.errors import PromptError

WINDOW_BATCHES = 16


def in_windows(
    prompts: Iterable[str],
    batch_size: int,
    generate: Callable[[list[str]], Sequence[Any]],
) -> Iterator[Any]:
    """The answers of `generate` to each prompt, in the prompts' order.

    Args:
        prompts: read as answers are taken, `WINDOW_BATCHES` batches ahead.
        batch_size: prompts a batch.
        generate: prompts → their answers, in order.
    """
    source, done = iter(prompts), 0
    while window := list(islice(source, WINDOW_BATCHES * batch_size)):
        # A batch is as long as its longest row: rows of one length waste the least.
        order = sorted(range(len(window)), key=lambda i: len(str(window[i])))
        answers: list[Any] = [None] * len(window)
        try:
            sorted_answers = generate([window[i] for i in order])
        except PromptError:
            _name_the_prompt(window, done, generate)
            raise
        for place, answer in zip(order, sorted_answers, strict=True):
            answers[place] = answer
        yield from answers
        done += len(window)


def _name_the_prompt(
    window: list[str], done: int, generate: Callable[[list[str]], Sequence[Any]]
) -> None:
    # The error counts in the sorted window, which the caller has never seen.
    for place, prompt in enumerate(window):
        try:
            generate([prompt])
        except PromptError as error:
            raise PromptError(f"prompts[{done + place}]: {error}") from None
