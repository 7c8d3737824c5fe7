"""How t is drawn in training: uniformly, or where the loss is large (DiffuSeq's importance draw).

The draws are pure functions of (seed, step, sample), so that a resumed run draws what an
uninterrupted one would have drawn.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dlmone_fast.kernels.noise import Stream, random_bits, uniform_integers

_HISTORY = 10
_UNIFORM_SHARE = 0.001


class TimestepSampler(Protocol):
    """Draws t and the weights that keep the expected loss unchanged."""

    def sample(self, seed: int, step: int, samples: Tensor) -> tuple[Tensor, Tensor]:
        """t [B] int64 and importance weights [B] float32 for global sample indices [B]."""

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take note of per-sample losses [B] at t [B]."""

    def state(self) -> dict[str, Tensor]:
        """Tensors to checkpoint."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from checkpointed tensors."""


class UniformTimesteps:
    """t uniform over 0 … T - 1."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def sample(self, seed: int, step: int, samples: Tensor) -> tuple[Tensor, Tensor]:
        t = uniform_integers(seed, Stream.TIMESTEP, samples, step, 0, self.num_timesteps)
        return t, torch.ones(len(t))

    def update(self, t: Tensor, losses: Tensor) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass


class LossAwareTimesteps:
    """t drawn in proportion to the root mean square of its last ten losses (DiffuSeq).

    Uniform until every t has ten losses; then mixed with 0.1 % uniform, and weighted by
    1 / (T p_t) so that the expected loss stays that of a uniform draw.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self.history = torch.zeros(num_timesteps, _HISTORY, dtype=torch.float64)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """p_t, float64 [T]."""
        if int(self.counts.min()) < _HISTORY:
            return torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64)
        weights = self.history.square().mean(1).sqrt()
        weights = weights / weights.sum()
        return (1 - _UNIFORM_SHARE) * weights + _UNIFORM_SHARE / self.num_timesteps

    def sample(self, seed: int, step: int, samples: Tensor) -> tuple[Tensor, Tensor]:
        p = self.probabilities()
        uniform = random_bits(seed, Stream.TIMESTEP, samples, step, 0).double() / 2**32
        t = torch.searchsorted(p.cumsum(0), uniform, right=True).clamp(max=self.num_timesteps - 1)
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        for index, loss in zip(t.tolist(), losses.double().tolist(), strict=True):
            count = int(self.counts[index])
            if count == _HISTORY:
                self.history[index] = self.history[index].roll(-1)
                self.history[index, -1] = loss
            else:
                self.history[index, count] = loss
                self.counts[index] += 1

    def state(self) -> dict[str, Tensor]:
        return {"history": self.history, "counts": self.counts}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.history.copy_(state["history"])
        self.counts.copy_(state["counts"])
