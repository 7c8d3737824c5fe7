"""A worker process: takes what waits, generates for it in common network calls, answers each."""

from __future__ import annotations

import logging
import multiprocessing
import os
import secrets
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty
from typing import TYPE_CHECKING, Any

from litserve import LitAPI
from litserve.loops.base import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from dlmone_fast.errors import DlmOneError, UsageError
from dlmone_fast.serving.options import ServeOptions
from dlmone_fast.serving.spec import Answer, GenerateSpec, Job, is_probe
from dlmone_fast.serving.workers import Workers

if TYPE_CHECKING:
    from dlmone_fast.runtime import Generator
    from dlmone_fast.serving.front import Front

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 1.0
# A request without `steps` or `temperature` leaves them to the model.
_SHARED = ("steps", "temperature", "num_candidates", "select", "on_overflow")

_DEFECT = "the model failed; the server's log says why"


@dataclass(frozen=True)
class Taken:
    """A request that a worker has taken from the queue."""

    consumer: int
    uid: str
    job: Job

    @property
    def rows(self) -> int:
        """What it adds to a network batch."""
        return _rows(self.job)


class Worker(LitAPI):
    """A model in a process of its own.

    Args:
        options: the model and the sizes of batches.
        workers: where the process says that it is ready.
        front: of the HTTP process, which LitServe asks here how the workers are.
    """

    def __init__(self, options: ServeOptions, workers: Workers, front: Front) -> None:
        super().__init__(spec=GenerateSpec(), loop=BatchLoop())
        self.options, self.workers, self.front = options, workers, front
        self.generator: Generator | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what the HTTP process keeps to itself."""
        return {**self.__dict__, "front": None}

    def health(self) -> Awaitable[bool]:
        """Whether a worker answers; in the HTTP process."""
        return self.front.healthy()

    def setup(self, device: str) -> None:
        """Load the model and answer once.

        Raises:
            DlmOneError: the model cannot be loaded here; the server's process is told.
        """
        # Here, for the server's other processes have no use for torch.
        from dlmone_fast.runtime import load_model

        # Ctrl-C reaches every process of a terminal; this one has answers to finish.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        options = self.options
        try:
            self.generator = load_model(
                options.model, device, options.dtype, backend=options.backend
            )
            self.generator.warmup((1, options.max_batch_size))
            self.workers.loaded(self.generator.settings.steps)
        except DlmOneError as error:
            self.workers.failed(error)
            # Its message is the command's own; LitServe would print a traceback before it.
            logging.getLogger("litserve").setLevel(logging.CRITICAL)
            raise

    def predict(self, x: Sequence[Job], **_: Any) -> list[Answer]:
        """An answer to each job: what a call of `generate` with its arguments alone gives."""
        x = [self._readable(job) if is_probe(job) else job for job in x]
        answers: list[Answer] = [{} for _ in x]
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for place, job in enumerate(x):
            refused = self._refused(job)
            if refused:
                answers[place] = {"status": 422, "detail": refused}
            else:
                groups[tuple(job[name] for name in _SHARED)].append(place)
        for shared, places in groups.items():
            made = self._generated([x[place] for place in places], shared)
            for place, answer in zip(places, made, strict=True):
                answers[place] = answer
        return answers

    def _readable(self, probe: Job) -> Job:
        """A probe with a prompt that the model reads; the HTTP process knows no letters."""
        assert self.generator is not None
        return {**probe, "prompts": [self.generator.tokenizer.example]}

    def _refused(self, job: Job) -> str:
        """Why the model cannot read a job's prompts; "": it can."""
        assert self.generator is not None
        try:
            for place, prompt in enumerate(job["prompts"]):
                self.generator.check_prompt(prompt, job["on_overflow"], f"prompts[{place}]")
        except UsageError as error:
            return str(error)
        return ""

    def _generated(self, jobs: Sequence[Job], shared: tuple[Any, ...]) -> list[Answer]:
        assert self.generator is not None
        prompts = [prompt for job in jobs for prompt in job["prompts"]]
        try:
            texts = self.generator.generate(
                prompts,
                seed=[seed for job in jobs for seed in _seeds(job)],
                batch_size=self.options.max_batch_size,
                progress=False,
                **dict(zip(_SHARED, shared, strict=True)),
            )
        except UsageError as error:
            # Of the settings, which these jobs have in common.
            return [{"status": 422, "detail": str(error)} for _ in jobs]
        except Exception:
            logger.exception("generating for %d requests failed", len(jobs))
            return [{"status": 500, "detail": _DEFECT} for _ in jobs]
        left: Iterator[Any] = iter(texts)
        answers = [
            {"status": 200, "texts": [next(left) for _ in job["prompts"]], "rows": 0}
            for job in jobs
        ]
        asked = [place for place, job in enumerate(jobs) if not is_probe(job)]
        if asked:
            answers[asked[0]]["rows"] = sum(_rows(jobs[place]) for place in asked)
        return answers


class BatchLoop(LitLoop):
    """Waits for a request, then for others while the batch has room and the time is not over.

    LitServe's own loop asks its queue a thousand times a second, also when nothing is to be done.
    """

    def run(
        self,
        lit_api: Worker,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        """One batch; LitServe calls it again and again."""
        lit_api.workers.ready(worker_id)
        try:
            taken = list(self._taken(lit_api.options, request_queue, transport))
            if not taken:
                _end_with_parent()
                return
            answers = lit_api.predict([request.job for request in taken])
            for request, answer in zip(taken, answers, strict=True):
                self._put(transport, request, answer, LitAPIStatus.OK)
        except (EOFError, ConnectionError):
            # The process that holds the queues is gone, and with it the server.
            sys.exit(1)

    def _taken(self, options: ServeOptions, queue: Any, transport: Any) -> Iterator[Taken]:
        rows, wait, until = 0, _IDLE_SECONDS, float("inf")
        while rows < options.max_batch_size:
            try:
                consumer, uid, since, job = queue.get(timeout=wait)
            except Empty:
                return
            now = time.monotonic()
            until = min(until, now + options.batch_timeout_ms / 1000)
            wait = max(0.0, until - now)
            # Who asked for it has been told that time is over.
            if now - since < options.timeout_s:
                request = Taken(consumer, uid, job)
                # Tells who is to be answered if this process ends.
                self._put(transport, request, (), LitAPIStatus.START)
                rows += request.rows
                yield request

    def _put(self, transport: Any, request: Taken, data: Any, status: LitAPIStatus) -> None:
        self.put_response(
            transport, request.consumer, request.uid, data, status, LoopResponseType.REGULAR
        )


def _rows(job: Job) -> int:
    return len(job["prompts"]) * int(job["num_candidates"])


def _seeds(job: Job) -> list[int]:
    seed = job["seed"]
    if seed is None:
        return [secrets.randbits(64) for _ in job["prompts"]]
    return list(seed) if isinstance(seed, list) else [seed] * len(job["prompts"])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        sys.exit(1)
