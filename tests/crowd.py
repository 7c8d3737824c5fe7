"""Many threads on one model; where they stand still, a test fails instead of hanging."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from dlmone_fast.runtime import Generator

STANDSTILL = 60.0
"""Seconds without a single call that ends, after which threads count as deadlocked."""


@dataclass
class Crowd:
    """What came of a crowd.

    Attributes:
        answers: of each thread, by the prompt's place.
        beside: how often what went on beside it was done.
        errors: what the threads ended with instead.
    """

    answers: list[dict[int, str]]
    beside: int = 0
    errors: list[BaseException] = field(default_factory=list)


def ask_from_threads(
    generator: Generator,
    prompts: Sequence[str],
    *,
    threads: int,
    calls: int,
    beside: Callable[[], object],
) -> Crowd:
    """Let each thread ask for `calls` prompts, one a call, in an order of its own.

    A prompt's place is its seed. `beside` runs again and again in one more thread until all are
    answered.
    """
    crowd = Crowd([{} for _ in range(threads)])
    stop, ended = threading.Event(), [0] * (threads + 1)

    def ask(thread: int) -> None:
        for number in range(calls):
            place = (number * 7 + thread * 13) % len(prompts)
            crowd.answers[thread][place] = generator.generate(prompts[place], seed=place)
            ended[thread] += 1

    def go_on_beside() -> None:
        while not stop.is_set():
            beside()
            crowd.beside += 1
            ended[-1] += 1

    def caught(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            crowd.errors.append(error)

    asking = [_started(caught, lambda thread=thread: ask(thread)) for thread in range(threads)]
    other = _started(caught, go_on_beside)
    _wait_for(asking, lambda: sum(ended))
    stop.set()
    _wait_for([other], lambda: sum(ended))
    return crowd


def _started(run: Callable[..., None], work: Callable[[], None]) -> threading.Thread:
    # A daemon: the process can end while it stands still.
    thread = threading.Thread(target=run, args=(work,), daemon=True)
    thread.start()
    return thread


def _wait_for(threads: Sequence[threading.Thread], progress: Callable[[], int]) -> None:
    seen, since = progress(), time.monotonic()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.01)
        if progress() != seen:
            seen, since = progress(), time.monotonic()
        elif time.monotonic() - since > STANDSTILL:
            faulthandler.dump_traceback(sys.stderr)
            pytest.fail(f"no call ended for {STANDSTILL:.0f} s: the stacks are on stderr")
