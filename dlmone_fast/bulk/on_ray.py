"""Shards on the workers of Ray Data: an actor holds a model and makes one shard after another."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

from dlmone_fast.bulk.job import Job
from dlmone_fast.bulk.shards import Shard
from dlmone_fast.errors import BackendUnavailableError, DlmOneError


class _ShardActor:
    """A worker's state: the model, loaded once."""

    def __init__(self, job: Job, batch_size: int, threads: int) -> None:
        import torch

        from dlmone_fast.bulk.worker import ShardWriter
        from dlmone_fast.runtime import load_model

        torch.set_num_threads(threads)
        options = job.options
        generator = load_model(
            options.model, options.device, options.dtype, backend=options.backend
        )
        self.writer = ShardWriter(job, generator, batch_size)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the shards [n] of a batch; their indices."""
        made = []
        for item in batch["shard"]:
            shard = Shard(**item)
            self.writer.write(shard)
            made.append(shard.index)
        return {"index": made}


def import_ray() -> Any:
    """The module `ray`.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    _check_installed()
    import ray

    return ray


def _check_installed() -> None:
    if importlib.util.find_spec("ray") is None:
        raise BackendUnavailableError(
            "bulk generation needs Ray, which is not installed: pip install 'dlmone_fast[ray]'"
        )


@contextlib.contextmanager
def connected() -> Iterator[bool]:
    """Within the block Ray is connected to the cluster that `RAY_ADDRESS` names; whether to one.

    Raises:
        BackendUnavailableError: Ray is not installed.
    """
    _check_installed()
    named = bool(os.environ.get("RAY_ADDRESS"))
    # Importing Ray takes a second, which a slip of the pen should not cost.
    if not (named or "ray" in sys.modules):
        yield False
        return
    ray = import_ray()
    mine = named and not ray.is_initialized()
    if mine:
        ray.init(log_to_driver=False)
    try:
        yield ray.is_initialized()
    finally:
        if mine:
            ray.shutdown()


def run_on_ray(
    job: Job, shards: list[Shard], *, workers: int, batch_size: int, threads: int
) -> Iterator[int]:
    """Make the shards; yields the index of each that is done, in any order.

    A worker that dies is replaced, and its shard made again: Ray Data's default. Runs on what Ray
    is connected to; otherwise on this machine, where Ray ends with it.

    Args:
        job: the job, whose folder every worker sees. On cuda each worker has a GPU to itself.
        shards: what is to be made.
        workers: how many at once.
        batch_size: texts a network call.
        threads: CPU threads of a worker.

    Raises:
        BackendUnavailableError: Ray is not installed.
        DlmOneError: a shard cannot be made; finished ones are kept.
    """
    ray = import_ray()
    mine = not ray.is_initialized()
    if mine:
        # Ray's own default leaves workers what other programs do not want.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(num_cpus=workers * threads, include_dashboard=False, log_to_driver=False)
    try:
        yield from _made(ray, job, shards, workers, batch_size, threads)
    finally:
        if mine:
            ray.shutdown()


def _made(
    ray: Any, job: Job, shards: list[Shard], workers: int, batch_size: int, threads: int
) -> Iterator[int]:
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"shard": shard.as_item()} for shard in shards]
    made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _ShardActor,
        fn_constructor_kwargs={"job": job, "batch_size": batch_size, "threads": threads},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=threads,
        num_gpus=1 if job.options.device == "cuda" else 0,
    )
    try:
        for row in made.iter_rows():
            yield int(row["index"])
    except ray.exceptions.RayError as error:
        cause = _own(error)
        if cause is None:
            raise
        raise cause from None


def _own(error: BaseException | None) -> DlmOneError | None:
    """The error of this package behind one of Ray's."""
    while error is not None:
        if isinstance(error, DlmOneError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
