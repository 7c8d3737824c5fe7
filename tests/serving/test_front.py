"""What the HTTP process says of workers: health and counts, with a worker played by the test."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from litserve.utils import LitAPIStatus

from dlmone_fast.serving import front as front_module
from dlmone_fast.serving.front import Front
from dlmone_fast.serving.options import ServeOptions
from dlmone_fast.serving.processes import make_server
from dlmone_fast.serving.spec import PATH, PROBE, is_probe
from dlmone_fast.serving.workers import Workers

JOB = {**PROBE, "prompts": ["ba", "be"], "probe": False}


class Server:
    """What LitServe holds: a queue and those who wait for answers."""

    def __init__(self) -> None:
        self.waiting: queue.Queue[Any] = queue.Queue()
        self.litapi_request_queues = {PATH: self.waiting}
        self.response_buffer: dict[str, Any] = {}
        self.app = SimpleNamespace(response_queue_id=0)

    def take(self) -> tuple[str, Any]:
        """As a worker takes a request."""
        _, uid, _, job = self.waiting.get_nowait()
        self.response_buffer[uid].worker_id = 0
        return uid, job

    def answer(self, uid: str, rows: int) -> None:
        """As a worker answers it."""
        item = self.response_buffer[uid]
        item.response = ({"status": 200, "texts": [], "rows": rows}, LitAPIStatus.OK)
        item.event.set()


def front() -> Front:
    """One with a worker that is ready and was never heard of."""
    made = Front(ServeOptions("model"), Workers())
    made.server, made._ready = Server(), 1
    return made


def run(scene: Callable[[Front], Awaitable[None]]) -> Front:
    """Play a scene; no task is left over."""
    made = front()

    async def play() -> None:
        async with asyncio.timeout(20):
            await scene(made)

    asyncio.run(play())
    return made


def counted(made: Front, name: str) -> float:
    """The value of a counter."""
    value = made.metrics.registry.get_sample_value(name)
    assert value is not None
    return value


async def taken(made: Front) -> tuple[str, Any]:
    """The next request, taken by the worker."""
    while made.server.waiting.empty():
        await asyncio.sleep(0.01)
    return made.server.take()


def test_a_busy_worker_is_healthy_and_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(front_module, "_FRESH_SECONDS", 0.0)

    async def scene(made: Front) -> None:
        job = asyncio.create_task(made.ask(JOB))
        uid, _ = await taken(made)
        started = time.monotonic()
        assert await made.healthy()
        assert time.monotonic() - started < 0.1
        assert made.server.waiting.empty()
        made.server.answer(uid, 2)
        await job

    run(scene)


def test_a_probe_that_waits_behind_work_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(front_module, "_FRESH_SECONDS", 0.0)

    async def scene(made: Front) -> None:
        job = asyncio.create_task(made.ask(JOB))
        await asyncio.sleep(0)
        # Nothing is under way yet: the worker is asked, and takes the job before the question.
        health = asyncio.create_task(made.healthy())
        await asyncio.sleep(0.05)
        assert not health.done()
        uid, found = await taken(made)
        assert not is_probe(found)
        assert await health
        made.server.answer(uid, 2)
        await job

    run(scene)


def test_a_worker_that_hangs_is_not_healthy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(front_module, "_FRESH_SECONDS", 0.0)
    monkeypatch.setattr(front_module, "_HEALTH_SECONDS", 0.3)

    async def scene(made: Front) -> None:
        job = asyncio.create_task(made.ask(JOB))
        await taken(made)
        assert await made.healthy()
        # Its time is over: the gate gives up on it.
        job.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await job
        health = asyncio.create_task(made.healthy())
        # A probe that the worker has taken does not vouch for it.
        assert is_probe((await taken(made))[1])
        assert not await made.healthy()
        assert not await health
        assert not made.server.response_buffer
        assert not made._probes

    run(scene)


def test_a_probe_that_is_lost_with_its_worker_is_no_lost_request():
    async def scene(made: Front) -> None:
        job, health = asyncio.create_task(made.ask(JOB)), asyncio.create_task(made._probed())
        await taken(made)
        await taken(made)
        made._lost(0)
        assert (await job)["status"] == 503
        assert not await health

    assert counted(run(scene), "dlmone_requests_lost_with_worker_total") == 1


def test_a_monitor_that_crashes_is_told_of_unless_the_server_stops(
    caplog: pytest.LogCaptureFixture,
):
    stopping: list[bool] = []
    logger = logging.getLogger("litserve.server")
    before = list(logger.filters)
    make_server(ServeOptions("model", device="cpu"), Workers(), lambda: bool(stopping))
    try:
        logger.error("Monitoring worker crashed")
        stopping.append(True)
        logger.error("Monitoring worker crashed")
        logger.error("another error")
    finally:
        logger.filters = before
    assert caplog.messages == ["Monitoring worker crashed", "another error"]


def test_probes_are_in_no_count():
    async def scene(made: Front) -> None:
        health = asyncio.create_task(made.healthy())
        while made.server.waiting.empty():
            await asyncio.sleep(0.01)
        assert counted(made, "dlmone_queue_depth") == 0
        uid, probe = await taken(made)
        assert is_probe(probe)
        made.server.answer(uid, 0)
        assert await health
        # For a while nobody asks again.
        assert await made.healthy()
        assert made.server.waiting.empty()
        job = asyncio.create_task(made.ask(JOB))
        while made.server.waiting.empty():
            await asyncio.sleep(0.01)
        assert counted(made, "dlmone_queue_depth") == 1
        made.server.answer((await taken(made))[0], 2)
        await job

    made = run(scene)
    assert counted(made, "dlmone_prompts_total") == 2
    assert counted(made, "dlmone_batch_rows_count") == 1
    assert counted(made, "dlmone_batch_rows_sum") == 2
