"""A server on Ray Serve, to compare with: `python -m benchmarks.serving.on_ray MODEL PORT`.

It batches, bounds the queue (Ray answers a full one with 503) and answers POST /generate; the same
code makes the batches' content. It has no limits on requests and does not check them.
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.serving.setup import BATCH, BATCH_TIMEOUT_MS, QUEUED, TIMEOUT_S
from dlmone_fast.serving.options import ServeOptions


@serve.deployment(max_ongoing_requests=BATCH + QUEUED, max_queued_requests=QUEUED)
class Deployment:
    """One replica, one model.

    Args:
        model: its folder.
    """

    def __init__(self, model: str) -> None:
        from dlmone_fast.serving.worker import Worker
        from dlmone_fast.serving.workers import Workers

        options = ServeOptions(model, max_batch_size=BATCH, device="cpu", backend="eager")
        self.worker = Worker(options, Workers(), None)  # type: ignore[arg-type]
        # LitServe would call it in a process of its own.
        signal.signal = lambda *_: None
        self.worker.setup("cpu")

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_TIMEOUT_MS / 1000)
    async def answer(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A batch."""
        return self.worker.predict(jobs)

    async def __call__(self, request: Request) -> dict[str, Any]:
        """A request."""
        if request.method == "GET":
            return {"status": "ok"}
        asked = await request.json()
        job = {
            "prompts": [asked["prompts"]], "seed": asked["seed"], "steps": None,
            "temperature": None, "num_candidates": 1, "select": "none", "on_overflow": "error",
        }  # fmt: skip
        return {"texts": (await self.answer(job))["texts"]}


def main(model: str, port: str) -> None:
    """Serve until SIGTERM."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": int(port), "request_timeout_s": TIMEOUT_S})
    deployment: Any = Deployment
    serve.run(deployment.bind(model), route_prefix="/")
    # Only now: Ray has a handler of its own, which aborts.
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
