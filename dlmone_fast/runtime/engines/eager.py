"""The networks in plain PyTorch, on any device."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.runtime.engines.base import Engine, Runner
from dlmone_fast.runtime.engines.network import InferenceNetwork


class EagerEngine(Engine):
    """f(x_t, t) operation by operation, with the weights as they are now.

    Args:
        denoiser: the networks; a change of theirs asks for a new engine.
        precision: "fp32", "bf16" or "fp16".
    """

    name: ClassVar[str] = "eager"
    any_length: ClassVar[bool] = True

    def __init__(self, denoiser: Denoiser, precision: str) -> None:
        self.precision = precision
        self.network = InferenceNetwork(denoiser, precision)

    def runner(self) -> Runner:
        """A new runner."""
        return _EagerRunner(self.network)

    def close(self) -> None:
        """Drop the converted weights."""
        del self.network


class _EagerRunner(Runner):
    def __init__(self, network: InferenceNetwork) -> None:
        self._network = network

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self._network(x_t, t)

    def predict_given(self, x_t: Tensor, t: Tensor, estimate: Tensor | None) -> Tensor:
        return self._network(x_t, t, estimate=estimate)

    def predict_from(self, x_t: Tensor, t: Tensor, first: int) -> Tensor:
        return self._network(x_t, t, first)
