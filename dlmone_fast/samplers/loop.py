"""The sampling loop shared by all teacher samplers; memory does not grow with the steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dlmone_fast.checks import as_real
from dlmone_fast.diffusion import Schedule
from dlmone_fast.diffusion.schedule import keep_source
from dlmone_fast.errors import UsageError
from dlmone_fast.samplers import steps as step
from dlmone_fast.samplers.grids import timestep_grid

Predict = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]


@dataclass(frozen=True)
class SamplerOptions:
    """How to sample.

    Attributes:
        method: one of `METHODS`.
        steps: network calls.
        eta: noise of the ddim sampler, 0 (deterministic) to 1.
        clamp: round x̂0 to the nearest embedding at every step; None: as the method was
            published (yes for ancestral and published-ddim, no for the others).
        temperature: factor of all noise, the first included.
    """

    method: str = "ddim"
    steps: int = 20
    eta: float = 0.0
    clamp: bool | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        eta = as_real(self.eta)
        if eta is None or not 0 <= eta <= 1:
            raise UsageError(f"eta must be a number from 0 to 1, got {self.eta!r}")
        if self.eta and self.method != "ddim":
            raise UsageError(
                f"eta belongs to the ddim sampler, got eta={self.eta} for {self.method}"
            )

    @property
    def rounds(self) -> bool:
        """Whether x̂0 is rounded at every step."""
        if self.clamp is None:
            return self.method in ("ancestral", "published-ddim")
        return self.clamp


@torch.no_grad()
def sample(
    predict: Callable[..., Tensor],
    schedule: Schedule,
    options: SamplerOptions,
    source: Tensor,
    mask: Tensor,
    noise: Noise,
    round_to_embedding: Callable[[Tensor], Tensor],
    callback: Callable[[int, int, Tensor], None] | None = None,
    self_conditioning: bool = False,
) -> Tensor:
    """Draw target embeddings for clean sources.

    Args:
        predict: f(x_t [B, L, d], t [B]) → x̂0 [B, L, d], t in 0 … T - 1.
        schedule: the noise schedule.
        options: sampler, number of calls, eta, rounding.
        source: embeddings [B, L, d] of the whole sequence; only source positions are read.
        mask: [B, L], 0 on source positions.
        noise: standard normal draws [B, L, d]; `noise(0)` starts, `noise(k)` serves call k ≥ 1.
        round_to_embedding: x [B, L, d] → the nearest embedding rows [B, L, d].
        callback: called as (k, t, x) after each call, x being the new state.
        self_conditioning: give `predict` a third argument: None in the first call, then its last
            x̂0 with the clean source (Analog Bits, arXiv 2208.04202).

    Returns:
        x_0 [B, L, d], source positions clean.
    """
    grid = timestep_grid(options.method, options.steps, schedule.num_timesteps)
    if options.temperature != 1:
        noise = _scaled(noise, options.temperature)
    x = keep_source(noise(0), source, mask)
    before: tuple[Tensor, int] | None = None
    given: tuple[Tensor | None, ...] = (None,) if self_conditioning else ()
    for k, t in enumerate(grid, start=1):
        t_next = grid[k] if k < len(grid) else None
        x0 = predict(x, torch.full((len(x),), t, device=x.device), *given)
        if self_conditioning:
            # As in training: before any rounding.
            given = (keep_source(x0, source, mask),)
        x0 = round_to_embedding(x0) if options.rounds else x0
        # Every method returns to the clean source: its own update would keep the network's.
        x = keep_source(
            _advance(schedule, options, x0, x, t, t_next, before, noise, k), source, mask
        )
        before = (x0, t)
        if callback is not None:
            callback(k, t, x)
    return x


def _scaled(noise: Noise, factor: float) -> Noise:
    return lambda k: factor * noise(k)


def _advance(
    schedule: Schedule,
    options: SamplerOptions,
    x0: Tensor,
    x: Tensor,
    t: int,
    t_next: int | None,
    before: tuple[Tensor, int] | None,
    noise: Noise,
    k: int,
) -> Tensor:
    if options.method == "ancestral":
        return step.ancestral(schedule, x0, x, torch.full((len(x),), t, device=x.device), noise(k))
    if options.method == "published-ddim":
        return step.published_ddim(schedule, x0, x, torch.full((len(x),), t, device=x.device))
    if options.method == "q-sampling":
        return step.renoise(schedule, x0, t_next, noise(k)) if t_next is not None else x0
    if options.method == "dpm-solver++":
        x0_before, t_before = before if before is not None else (None, None)
        return step.dpm_solver(schedule, x0, x, t, t_next, x0_before, t_before)
    needs_noise = options.eta > 0 and t_next is not None
    return step.ddim(schedule, x0, x, t, t_next, options.eta, noise(k) if needs_noise else None)
