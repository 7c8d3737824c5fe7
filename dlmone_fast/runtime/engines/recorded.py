"""What a graph replays, with the memory that it reads and writes.

A recording belongs to one runner. Its memory is overwritten by the next batch, so results leave as
copies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels.nearest_token import nearest_token
from dlmone_fast.runtime.engines.capture import Lane
from dlmone_fast.runtime.engines.network import InferenceNetwork
from dlmone_fast.runtime.pipeline import Pipeline
from dlmone_fast.runtime.rows import RowBatch


class RecordedPath:
    """From ids to ids: noise, network calls and rounding of one pipeline at one batch shape."""

    def __init__(
        self, lane: Lane, network: InferenceNetwork, pipeline: Pipeline, rows: int, length: int
    ) -> None:
        self._lane, self._network = lane, network
        # Holds the vocabulary, whose prepared tables the recording reads.
        self._pipeline = pipeline
        self.rows = rows
        self._shape = rows, length, len(pipeline.times)
        with lane.entered():
            count = sum(_sizes(*self._shape))
            self._staging = lane.host_memory(count)
            self._inputs = torch.zeros(count, dtype=torch.int64, device=network.device)
            self._result = lane.host_memory(rows * length)
            self._found = torch.zeros(rows, length, dtype=torch.int64, device=network.device)
        self._staged = _views(self._staging, *self._shape)
        self._call = lane.call()
        self._call.capture(self._work)

    def __repr__(self) -> str:
        rows, length, steps = self._shape
        return f"{steps} step(s) of {rows} rows of {length}"

    def _work(self) -> None:
        ids, mask, draws = _views(self._inputs, *self._shape)
        calls = _CallsInTurn(self._network, self._pipeline)
        x0 = self._pipeline.embeddings(calls, ids, mask, draws)
        # All positions, as which are targets is not known while recording.
        found = nearest_token(x0, self._pipeline.vocabulary)
        self._found.copy_(torch.where(mask != 0, found, ids))

    def run(self, batch: RowBatch) -> Tensor:
        """Ids [len(batch), L] of a batch that fits, on the CPU."""
        self._stage(batch)
        with self._lane.entered():
            self._inputs.copy_(self._staging, non_blocking=True)
            self._call.replay()
            result = self._result.view(self._found.shape)
            result.copy_(self._found, non_blocking=True)
        self._lane.wait()
        return result[: len(batch)].clone()

    def _stage(self, batch: RowBatch) -> None:
        _check_ids(batch.ids, len(self._pipeline.vocabulary))
        rows = len(batch)
        ids, mask, draws = self._staged
        for staged, given in ((ids, batch.ids), (mask, batch.mask)):
            staged[:rows] = given
            staged[rows:] = given[:1]
        draws[:, :rows] = batch.draws
        draws[:, rows:] = batch.draws[:, :1]

    def drop(self) -> None:
        """Give the recording back."""
        self._call.drop()


class _CallsInTurn:
    """f(x_t, t) of a pipeline's calls, whose timesteps are numbers that need no computing."""

    def __init__(self, network: InferenceNetwork, pipeline: Pipeline) -> None:
        self._network = network
        self._times: Iterator[int] = iter(pipeline.times)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        time = self._network.time_of(next(self._times))
        return self._network.body(x_t, time.expand(len(x_t), -1))


class RecordedNetwork:
    """One network call at one shape."""

    def __init__(self, lane: Lane, network: InferenceNetwork, rows: int, length: int) -> None:
        self._lane, self._network = lane, network
        self.rows = rows
        width, device = network.config.embedding_dim, network.device
        with lane.entered():
            self._x_t = torch.zeros(rows, length, width, device=device)
            self._t = torch.zeros(rows, dtype=torch.int64, device=device)
            self._x0 = torch.empty_like(self._x_t)
        self._call = lane.call()
        self._call.capture(self._work)

    def __repr__(self) -> str:
        rows, length = self._t.shape[0], self._x_t.shape[1]
        return f"one network call of {rows} rows of {length}"

    def _work(self) -> None:
        self._x0.copy_(self._network(self._x_t, self._t))

    def run(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x̂0 of a batch that fits; on the caller's stream."""
        rows, found = len(x_t), torch.empty_like(x_t)
        with self._lane.between_callers_work(x_t, t, found):
            for static, given in ((self._x_t, x_t), (self._t, t)):
                static[:rows] = given
                static[rows:] = given[:1]
            self._call.replay()
            found.copy_(self._x0[:rows])
        return found

    def drop(self) -> None:
        """Give the recording back."""
        self._call.drop()


def _sizes(rows: int, length: int, steps: int) -> tuple[int, int, int]:
    """Numbers in ids, mask and draws."""
    return rows * length, rows * length, steps * rows * 4


def _views(memory: Tensor, rows: int, length: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, L], mask [B, L] and draws [steps, B, 4], one behind the other: one copy moves all."""
    ids, mask, draws = memory.split(_sizes(rows, length, steps))
    return ids.view(rows, length), mask.view(rows, length), draws.view(steps, rows, 4)


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    # Nothing on the device would refuse them.
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= vocabulary:
        raise UsageError(
            f"ids must lie in [0, {vocabulary}), the rows of the embedding, got values from "
            f"{low} to {high}; tokenize with the model's own vocabulary"
        )
