"""The HTTP process' side of the queue: hands requests to workers and waits for their answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from litserve.utils import LitAPIStatus, ResponseBufferItem

from dlmone_fast.serving.metrics import Metrics
from dlmone_fast.serving.options import ServeOptions
from dlmone_fast.serving.spec import PATH, PROBE, Answer, Job, is_probe
from dlmone_fast.serving.workers import Workers

_TICK_SECONDS = 0.1
# An answer as recent as this says as much of the model as a question of one's own.
_FRESH_SECONDS = 10.0
_HEALTH_SECONDS = 10.0
_LOST = "the worker process that had this request ended; send it again, another one is starting"


class Front:
    """Requests under way in this process.

    Args:
        options: limits.
        workers: which workers live.
    """

    def __init__(self, options: ServeOptions, workers: Workers) -> None:
        self.options, self.workers, self.metrics = options, workers, Metrics()
        self.server: Any = None
        self.in_flight = 0
        self._ready = 0
        self._answered = float("-inf")
        self._probes: set[str] = set()
        self._probe: asyncio.Task[bool] | None = None
        watch = self.metrics.watch
        watch("dlmone_requests_in_flight", "Requests accepted, not answered", self._in_flight)
        watch("dlmone_queue_depth", "Requests that wait for a worker", self._waiting)
        watch("dlmone_workers_ready", "Worker processes that take requests", lambda: self._ready)

    def refusal(self) -> tuple[int, str] | None:
        """Status and reason why no request can be accepted now."""
        if not self._ready:
            return 503, "no worker process is ready; try again in some seconds"
        if self.in_flight >= self.options.max_in_flight:
            return 429, (
                f"{self.options.max_in_flight} requests are under way, as many as this server "
                "accepts; try again later, or start it with a larger --max-queued"
            )
        return None

    async def ask(self, job: Job) -> Answer:
        """What a worker says to a job; may be cancelled, which is how time runs out."""
        uid, server = str(uuid.uuid4()), self.server
        item = server.response_buffer[uid] = ResponseBufferItem(asyncio.Event())
        if is_probe(job):
            self._probes.add(uid)
        try:
            queue = server.litapi_request_queues[PATH]
            queue.put((server.app.response_queue_id, uid, time.monotonic(), dict(job)))
            await item.event.wait()
        except (EOFError, OSError):
            return {"status": 503, "detail": "the server's queue is gone; it is ending"}
        finally:
            del server.response_buffer[uid]
            self._probes.discard(uid)
        answer: Answer = item.response[0]
        if answer["status"] == 200:
            self._answered = time.monotonic()
            if not is_probe(job):
                self._count(job, answer)
        return answer

    async def healthy(self) -> bool:
        """Whether a worker answers: it did a moment ago, is at work, or answers when asked."""
        if not self._ready:
            return False
        if self._seen_alive():
            return True
        # Of many that ask at once, one question goes to the worker.
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._probed())
        while not self._probe.done():
            await asyncio.wait({self._probe}, timeout=_TICK_SECONDS)
            if self._seen_alive():
                return True
        return self._probe.result()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Look after the other processes for the length of the block."""
        task = asyncio.create_task(self._watch(os.getppid()))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _count(self, job: Job, answer: Answer) -> None:
        self.metrics.prompts.inc(len(job["prompts"]))
        if answer["rows"]:
            self.metrics.rows.observe(answer["rows"])

    def _seen_alive(self) -> bool:
        """Whether a worker answered a moment ago, or has a request whose time is not over."""
        if time.monotonic() - self._answered < _FRESH_SECONDS:
            return True
        # A request leaves the buffer with its time limit, so that a worker that hangs is found out.
        # A probe would vouch for the worker that it asks.
        return any(item.worker_id is not None for item in self._requests())

    async def _probed(self) -> bool:
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                return bool((await self.ask(PROBE))["status"] == 200)
        except TimeoutError:
            return False

    async def _watch(self, parent: int) -> None:
        while True:
            alive = self.workers.alive()
            self._ready = sum(alive.values())
            for number in (number for number, lives in alive.items() if not lives):
                self._lost(number)
            if os.getppid() != parent:
                # Nobody would start a worker again, or end the process that holds the queues.
                self.server.end_queues()
                os.kill(os.getpid(), signal.SIGTERM)
                return
            await asyncio.sleep(_TICK_SECONDS)

    def _lost(self, worker: int) -> None:
        for uid, item in self.server.response_buffer.items():
            if item.worker_id == worker and not item.event.is_set():
                item.response = ({"status": 503, "detail": _LOST}, LitAPIStatus.OK)
                item.event.set()
                if uid not in self._probes:
                    self.metrics.lost_workers.inc()

    def _requests(self) -> Iterator[ResponseBufferItem]:
        """What has no answer yet, without probes."""
        for uid, item in self.server.response_buffer.items():
            if uid not in self._probes and not item.event.is_set():
                yield item

    def _in_flight(self) -> float:
        return self.in_flight

    def _waiting(self) -> float:
        return sum(item.worker_id is None for item in self._requests())
