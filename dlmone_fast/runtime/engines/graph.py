"""Generation as CUDA graphs: one launch for the whole way from ids to ids.

A sentence of one network call is about as long on a GPU as launching its kernels one by one takes.
A graph per pipeline and bucket of batch sizes launches them together.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Hashable
from typing import ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from dlmone_fast.errors import ForkedProcessError, ModelNotLoadedError
from dlmone_fast.kernels.triton import support
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.runtime.engines.base import Engine, Runner
from dlmone_fast.runtime.engines.buckets import BUCKETS, bucket_of, parts_of
from dlmone_fast.runtime.engines.capture import CAPTURING, Lane, is_out_of_memory
from dlmone_fast.runtime.engines.network import DTYPES, InferenceNetwork
from dlmone_fast.runtime.engines.recorded import RecordedNetwork, RecordedPath
from dlmone_fast.runtime.pipeline import Pipeline
from dlmone_fast.runtime.rows import RowBatch

_MOST_RECORDINGS = 64

_log = logging.getLogger("dlmone_fast")

Recording: TypeAlias = RecordedPath | RecordedNetwork
R = TypeVar("R", RecordedPath, RecordedNetwork)
T = TypeVar("T")


class GraphEngine(Engine):
    """f(x_t, t) and all around it, recorded once for each batch shape and replayed.

    Args:
        denoiser: the networks, on a GPU; a change of theirs asks for a new engine.
        precision: "fp32", "bf16" or "fp16".
    """

    name: ClassVar[str] = "graph"
    # One stages its batch while the other's runs.
    runners: ClassVar[int] = 2

    def __init__(self, denoiser: Denoiser, precision: str) -> None:
        self.precision = precision
        self.network = InferenceNetwork(denoiser, precision)
        self.largest = BUCKETS[-1]
        self._process = os.getpid()
        self._closed = False
        self._made: weakref.WeakSet[GraphRunner] = weakref.WeakSet()

    def runner(self) -> GraphRunner:
        """A new runner.

        Raises:
            ForkedProcessError, ModelNotLoadedError: as for `check`.
        """
        self.check()
        runner = GraphRunner(self, Lane(self.network.device))
        self._made.add(runner)
        return runner

    def check(self) -> None:
        """Refuse to work where the graphs are not.

        Raises:
            ForkedProcessError: the engine was made before this process was forked.
            ModelNotLoadedError: it was closed.
        """
        if os.getpid() != self._process:
            raise ForkedProcessError(
                f"backend 'graph': this model was loaded in process {self._process} and cannot be "
                f"used in its fork {os.getpid()}, as CUDA does not survive a fork; load it in the "
                "process that uses it, or start processes with the 'spawn' method"
            )
        if self._closed:
            raise ModelNotLoadedError("backend 'graph': this model was unloaded; load it again")

    def fits_no_more_than(self, rows: int) -> None:
        """Split batches into parts of at most this many rows from now on."""
        self.largest = min(self.largest, rows)

    def close(self) -> None:
        """Drop all graphs and give their memory back; runners refuse to work afterwards."""
        # In a fork there is nothing that may be touched.
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        for runner in list(self._made):
            runner.drop()
        # The engine outlives its model, to refuse later calls.
        del self.network


class GraphRunner(Runner):
    """One stream with its own graphs and static memory."""

    def __init__(self, engine: GraphEngine, lane: Lane) -> None:
        self._engine = engine
        self._lane = lane
        self._recordings: dict[Hashable, Recording] = {}

    @torch.inference_mode()
    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x̂0 [B, L, d] of x_t at timesteps t, int64 [B]."""
        if not len(x_t):
            return torch.empty_like(x_t)
        length, t = x_t.shape[1], t.to(x_t.device)

        def part(first: int, last: int) -> Tensor:
            rows = bucket_of(last - first)
            recorded = self._recorded(
                ("network", rows, length),
                lambda: RecordedNetwork(self._lane, self._engine.network, rows, length),
            )
            return recorded.run(x_t[first:last], t[first:last])

        return torch.cat(self._parts(len(x_t), part))

    @torch.inference_mode()
    def ids(self, pipeline: Pipeline, batch: RowBatch) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, L]; margins are infinite, as no product is repeated to check them."""
        margins = torch.full((len(batch),), float("inf"))
        if not len(batch):
            return batch.ids.clone(), margins
        length = batch.ids.shape[1]

        def part(first: int, last: int) -> Tensor:
            recorded = self._path(pipeline, bucket_of(last - first), length)
            return recorded.run(batch.part(first, last))

        return torch.cat(self._parts(len(batch), part)), margins

    def drop(self) -> None:
        """Drop the graphs and give their memory back."""
        self._lane.wait()
        with CAPTURING:
            for recording in self._recordings.values():
                recording.drop()
            self._recordings.clear()
            self._lane.release()

    def _path(self, pipeline: Pipeline, rows: int, length: int) -> RecordedPath:
        # A graph reads one vocabulary's tables, so an equal pipeline of another is another.
        self._engine.check()
        key = (*pipeline.key, pipeline.vocabulary.handle, rows, length)
        network = self._engine.network
        return self._recorded(
            key, lambda: RecordedPath(self._lane, network, pipeline, rows, length)
        )

    def _parts(self, rows: int, run: Callable[[int, int], T]) -> list[T]:
        """`run(first, last)` of parts that fit: smaller ones where memory ends."""
        done: list[T] = []
        first = 0
        while first < rows:
            last = first + parts_of(rows - first, self._engine.largest)[0][1]
            bucket = bucket_of(last - first)
            try:
                done.append(run(first, last))
            except RuntimeError as error:
                if bucket == 1 or not is_out_of_memory(error):
                    raise
            else:
                first = last
                continue
            # Not while the error is handled: it holds on to the memory of what failed.
            self._shrink(bucket)
        return done

    def _shrink(self, bucket: int) -> None:
        _log.warning(
            "graph: %d rows do not fit into the device's memory; parts of %d from now on",
            bucket,
            bucket // 2,
        )
        self._engine.fits_no_more_than(bucket // 2)
        self._lane.wait()
        with CAPTURING:
            for key in [key for key, found in self._recordings.items() if found.rows >= bucket]:
                self._recordings.pop(key).drop()
            self._lane.release()

    def _recorded(self, key: tuple[Hashable, ...], record: Callable[[], R]) -> R:
        self._engine.check()
        found = self._recordings.get(key)
        if found is None:
            self._make_room()
            found = self._recordings[key] = self._record(record)
        return found  # type: ignore[return-value]

    def _make_room(self) -> None:
        # Few-step generation with ever other numbers of steps would fill the device.
        while len(self._recordings) >= _MOST_RECORDINGS:
            self._lane.wait()
            with CAPTURING:
                self._recordings.pop(next(iter(self._recordings))).drop()

    def _record(self, record: Callable[[], R]) -> R:
        with CAPTURING:
            started, before = time.perf_counter(), self._lane.reserved_bytes()
            recording = record()
            milliseconds = 1e3 * (time.perf_counter() - started)
            mib = (self._lane.reserved_bytes() - before) / 2**20
        _log.info("graph: recorded %s in %.0f ms, %.1f MiB", recording, milliseconds, mib)
        return recording


def why_not_graph(denoiser: Denoiser, precision: str) -> str | None:
    """None, or why a model's generation cannot run as CUDA graphs here."""
    if precision not in DTYPES:
        return f"it has no {precision}"
    if denoiser.config.in_slots:
        return "its recordings have one length, and this model's sources are in slots"
    table = denoiser.embedding
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    if table.device.type != "cuda":
        return f"it needs the model on a GPU, and it is on {table.device} (device='cuda')"
    # Rounding in plain torch reads scores back, which nothing can record.
    return support.usable(table)
