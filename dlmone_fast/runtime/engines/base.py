"""What an engine is: the network f(x_t, t) → x̂0 of one loaded model, in one way of running it.

An engine is made once a load. Its runners do the work: each belongs to one call at a time and holds
what must not be shared (static buffers, streams, inference requests).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from dlmone_fast.errors import BackendUnavailableError
from dlmone_fast.runtime.pipeline import Pipeline
from dlmone_fast.runtime.rows import RowBatch

NO_ESTIMATE = (
    "a teacher with self-conditioning reads its own last prediction at each call, and only the "
    "eager engine hands it over; students run on every engine"
)


class Runner(ABC):
    """One caller's way through an engine; not for two threads at once."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x̂0 [B, L, d] in fp32 of x_t [B, L, d] in fp32 at timesteps t, int64 [B]."""

    def predict_given(self, x_t: Tensor, t: Tensor, estimate: Tensor | None) -> Tensor:
        """`predict` of a self-conditioned teacher; `estimate` [B, L, d] is its last x̂0, if any.

        Raises:
            BackendUnavailableError: this engine reads no estimate.
        """
        if estimate is None:
            return self.predict(x_t, t)
        raise BackendUnavailableError(NO_ESTIMATE)

    def predict_from(self, x_t: Tensor, t: Tensor, first: int) -> Tensor:
        """`predict` at the positions from `first` on: [B, L - first, d].

        Runners that need not compute the others do better than this.
        """
        return self.predict(x_t, t)[:, first:]

    def ids(self, pipeline: Pipeline, batch: RowBatch) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, L] of a student's generation, and each row's smallest margin [B].

        Both on the CPU, in memory of the caller's own. Runners that capture the whole path do
        better than this.
        """
        return pipeline.run(self.predict, batch, self.predict_from)


class Engine(ABC):
    """A loaded network on one backend.

    Attributes:
        name: "eager", "compile", "graph" or "openvino".
        precision: "fp32", "bf16", "fp16" or "int8".
        runners: how many runners are worth having; more would fight for the same processors.
        any_length: whether sequences may be shorter than the model's own length.
    """

    name: ClassVar[str]
    runners: ClassVar[int] = 1
    any_length: ClassVar[bool] = False
    precision: str

    @abstractmethod
    def runner(self) -> Runner:
        """A new runner."""

    def close(self) -> None:  # noqa: B027 (most engines hold nothing)
        """Give back memory beyond the model's own. Runners must not be used afterwards."""
