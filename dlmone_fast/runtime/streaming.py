"""Inputs in batches: larger than memory a window at a time, order kept, and how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from tqdm import tqdm

from dlmone_fast.errors import PromptError

WINDOW_BATCHES = 16


def in_windows(
    prompts: Iterable[str],
    batch_size: int,
    generate: Callable[[list[str]], Sequence[Any]],
    check: Callable[[str, str], None],
) -> Iterator[Any]:
    """The answers of `generate` to each prompt, in the prompts' order.

    Args:
        prompts: read as answers are taken, `WINDOW_BATCHES` batches ahead.
        batch_size: prompts a batch.
        generate: prompts → their answers, in order.
        check: raises `PromptError` for a prompt that `generate` would refuse, by a name.
    """
    source, done = iter(prompts), 0
    while window := list(islice(source, WINDOW_BATCHES * batch_size)):
        # Similar lengths share a batch, for models that need not run at their full length.
        order = sorted(range(len(window)), key=lambda i: len(str(window[i])))
        answers: list[Any] = [None] * len(window)
        try:
            sorted_answers = generate([window[i] for i in order])
        except PromptError:
            _name_the_prompt(window, done, check)
            raise
        for place, answer in zip(order, sorted_answers, strict=True):
            answers[place] = answer
        yield from answers
        done += len(window)


def _name_the_prompt(window: list[str], done: int, check: Callable[[str, str], None]) -> None:
    # The error counts in the sorted window, which the caller has never seen.
    for place, prompt in enumerate(window):
        check(prompt, f"prompts[{done + place}]")


def with_progress(batches: range, progress: bool | None) -> Iterator[int]:
    """The batches of a call, with a bar where it is wanted; None: more than one, on a terminal."""
    if len(batches) == 1 and not progress:
        yield from batches
        return
    # tqdm's own None hides the bar when stderr is no terminal.
    hidden = None if progress is None and len(batches) > 1 else not progress
    yield from tqdm(batches, desc="generate", unit="batch", disable=hidden, leave=False)
