"""The networks in plain PyTorch, on any device."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.runtime.engines.base import Engine, Runner

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class EagerEngine(Engine):
    """f(x_t, t) as the networks define it, under autocast in 16 bits."""

    name: ClassVar[str] = "eager"

    def __init__(self, denoiser: Denoiser, precision: str) -> None:
        self.denoiser = denoiser
        self.precision = precision

    def runner(self) -> Runner:
        """A new runner."""
        return _EagerRunner(self)


class _EagerRunner(Runner):
    def __init__(self, engine: EagerEngine) -> None:
        self._engine = engine

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        denoiser, precision = self._engine.denoiser, self._engine.precision
        if precision == "fp32":
            return denoiser(x_t, t)
        with torch.autocast(x_t.device.type, _AUTOCAST[precision]):
            return denoiser(x_t, t)
