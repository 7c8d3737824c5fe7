"""Which worker processes live, and what they say of the model: memory that processes share."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

from dlmone_fast.errors import DlmOneError

_MOST = 256


class Workers:
    """Process ids of the workers that are ready, by their numbers, and why one could not start.

    Made in the main process, inherited by the others.
    """

    def __init__(self) -> None:
        spawned = multiprocessing.get_context("spawn")
        self._pids: Any = spawned.Array("q", _MOST, lock=False)
        self._steps: Any = spawned.Value("q", 1, lock=False)
        self._failures: Any = spawned.SimpleQueue()

    def ready(self, number: int) -> None:
        """In a worker: it takes requests from now on."""
        self._pids[number] = os.getpid()

    def loaded(self, steps: int) -> None:
        """In a worker: how many network calls a text takes where a request does not say."""
        self._steps.value = steps

    @property
    def own_steps(self) -> int:
        """The model's own steps; known once a worker is ready."""
        return int(self._steps.value)

    def failed(self, error: DlmOneError) -> None:
        """In a worker: it cannot start."""
        self._failures.put((type(error), str(error)))

    def failure(self) -> DlmOneError | None:
        """In the main process: why a worker could not start, if one said so."""
        if self._failures.empty():
            return None
        kind, message = self._failures.get()
        return kind(message)

    def alive(self) -> dict[int, bool]:
        """Whether it lives, for each worker that was ever ready."""
        return {number: is_alive(pid) for number, pid in enumerate(self._pids) if pid}


def is_alive(pid: int) -> bool:
    """Whether there is a process of this id, or one whose end its parent has not noticed yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
