"""How t is drawn in training: uniformly, where the loss is large (DiffuSeq's importance draw), or
where tokens become undecodable (a draw of log-SNR).

The draws are pure functions of (seed, step, sample), so that a resumed run draws what an
uninterrupted one would have drawn.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dlmone_fast.diffusion.decodability import nearest_timesteps
from dlmone_fast.diffusion.schedule import Schedule
from dlmone_fast.kernels.noise import Stream, random_bits, uniform_integers

_HISTORY = 10
_UNIFORM_SHARE = 0.001


class TimestepSampler(Protocol):
    """Draws t and each draw's weight in the loss."""

    def sample(self, seed: int, step: int, samples: Tensor) -> tuple[Tensor, Tensor]:
        """t [B] int64 and weights [B] float32 for global sample indices [B]."""

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


class LogSnrTimesteps(UniformTimesteps):
    """-ln SNR from a Gumbel distribution, for all but a uniform share of the draws of t.

    The form is what LangFlow (arXiv 2604.11748) learns. All weights are 1: that some t come more
    often changes the objective, by intention. t is the timestep whose log-SNR is nearest, so that
    what lies beyond the schedule falls on its ends.

    Args:
        schedule: the noise schedule.
        location: mode of -ln SNR; `-critical_log_snr` is where tokens become undecodable.
        scale: of the Gumbel distribution, whose long tail lies towards more noise.
        uniform_share: of draws that are uniform over 0 … T - 1.
        pure_share: of draws at T - 1, where x_t says nothing: the first call of every sampler.
    """

    def __init__(
        self,
        schedule: Schedule,
        location: float,
        scale: float,
        uniform_share: float,
        pure_share: float = 0.0,
    ) -> None:
        super().__init__(schedule.num_timesteps)
        self.schedule = schedule
        self.location, self.scale, self.uniform_share = location, scale, uniform_share
        self.pure_share = pure_share

    def sample(self, seed: int, step: int, samples: Tensor) -> tuple[Tensor, Tensor]:
        uniform, weight = super().sample(seed, step, samples)
        # The uniform t takes words 0 and 1 of the block.
        choice, u = (self._unit(seed, step, samples, word) for word in (2, 3))
        noise = self.location - self.scale * (-u.log()).log()
        t = nearest_timesteps(self.schedule, -noise)
        t = torch.where(choice < self.uniform_share, uniform, t)
        return torch.where(choice >= 1 - self.pure_share, self.num_timesteps - 1, t), weight

    @staticmethod
    def _unit(seed: int, step: int, samples: Tensor, word: int) -> Tensor:
        bits = random_bits(seed, Stream.TIMESTEP, samples, step, word)
        # Half a step inside 0 and 1, where the logarithms are finite.
        return (bits.double() + 0.5) / 2**32


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
