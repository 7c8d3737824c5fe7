"""Who may use an engine when: bounded calls, and runners handed from one call to the next."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dlmone_fast.errors import ForkedProcessError, ModelNotLoadedError, QueueFullError
from dlmone_fast.runtime.engines import Engine, Runner

MAX_QUEUED = 256


def unloaded_error() -> ModelNotLoadedError:
    """What a model says that was unloaded."""
    return ModelNotLoadedError("this model was unloaded; load it again: dlmone_fast.load")


class RunnerPool:
    """An engine's runners, made when they are first needed.

    A call is admitted as a whole; the batches of admitted calls then take turns on the runners, so
    that a long list does not keep a short one waiting until its end.

    Args:
        engine: what runs the network.
        max_queued: calls that may wait while as many as there are runners are served.
    """

    def __init__(self, engine: Engine, max_queued: int = MAX_QUEUED) -> None:
        self.engine = engine
        self.max_queued = max_queued
        self._changed = threading.Condition()
        self._free: list[Runner] = []
        self._made = 0
        self._calls = 0
        self._closed = False
        self._released = False
        self._process: int | None = None

    @contextmanager
    def call(self) -> Iterator[None]:
        """Admit one call of `generate` for the length of the block.

        Raises:
            QueueFullError: too many calls wait already.
            ModelNotLoadedError: the model was unloaded.
            ForkedProcessError: the process was forked after the model had run.
        """
        self._check_process()
        with self._changed:
            self.check_open()
            if self._calls >= self.engine.runners + self.max_queued:
                raise QueueFullError(
                    f"{self.max_queued} calls wait for this model already; try again later, or "
                    "load it with a larger max_queued"
                )
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    @contextmanager
    def runner(self) -> Iterator[Runner]:
        """A runner of one's own for the length of the block, waited for if need be."""
        runner = self._take()
        try:
            yield runner
        finally:
            with self._changed:
                self._free.append(runner)
                self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether calls are refused for good."""
        return self._closed

    def check_open(self) -> None:
        """Raise ModelNotLoadedError once calls are refused for good."""
        if self._closed:
            raise unloaded_error()

    def close(self) -> None:
        """Refuse new calls, wait for those under way, and give the engine's memory back.

        Whoever calls it returns when that is done; after an interruption it may be called again.
        """
        self._check_process()
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._calls == 0)
            if not self._released:
                self._free.clear()
                self.engine.close()
                self._released = True

    def _take(self) -> Runner:
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._made < self.engine.runners)
            if self._free:
                return self._free.pop()
            self._made += 1
            self._process = os.getpid()
        try:
            return self.engine.runner()
        except BaseException:
            with self._changed:
                self._made -= 1
                self._changed.notify_all()
            raise

    def _check_process(self) -> None:
        # Before any lock: a lock that was held while the process forked is never released here.
        if self._process not in (None, os.getpid()):
            raise ForkedProcessError(
                "this process was forked from one in which the model had already run: threads, "
                "streams and locks did not come along; load the model in each process, or start "
                "processes with the 'spawn' method"
            )
