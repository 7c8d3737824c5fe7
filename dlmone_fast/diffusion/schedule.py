"""Noise schedules and the forward process q(x_t | x_0) with the source kept clean.

Tables are float64, as in DiffuSeq (arXiv 2210.08933); a value is cast to float32 where it meets a
tensor. `t` counts from 0 (least noise) to T - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dlmone_fast.config import DiffusionConfig
from dlmone_fast.errors import UsageError
from dlmone_fast.kernels.forward_diffusion import forward_diffusion, forward_diffusion_of_tokens

_MAX_BETA = 0.999


class Draw(NamedTuple):
    """Noise by its counters instead of its values: it is made where it is used.

    `kernels/noise.py` defines seed, stream, sample (one for each row) and step; the values are
    those of `normal` with the same arguments.
    """

    seed: int
    stream: int
    sample: Tensor
    step: int


class Schedule:
    """Variance-preserving schedule: x_t = alpha_t x_0 + sigma_t noise, alpha_t² = alpha_bar_t.

    Attributes (float64 tensors [T] on the CPU): `betas`, `alphas_cumprod` (alpha_bar),
    `alphas_cumprod_prev` (alpha_bar of t - 1, 1 at t = 0), `posterior_mean_coef1`,
    `posterior_mean_coef2` and `posterior_variance` of q(x_{t-1} | x_t, x_0).
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.num_timesteps = config.num_timesteps
        self.betas = named_betas(config.schedule, config.num_timesteps)
        alphas = 1 - self.betas
        self.alphas_cumprod = torch.cumprod(alphas, 0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1).double(), self.alphas_cumprod[:-1]])
        one_minus, one_minus_prev = 1 - self.alphas_cumprod, 1 - self.alphas_cumprod_prev
        self.posterior_variance = self.betas * one_minus_prev / one_minus
        self.posterior_mean_coef1 = self.betas * self.alphas_cumprod_prev.sqrt() / one_minus
        self.posterior_mean_coef2 = one_minus_prev * alphas.sqrt() / one_minus
        self._tables = {
            "alpha": self.alphas_cumprod.sqrt(),
            "sigma": one_minus.sqrt(),
            "alpha_prev": self.alphas_cumprod_prev.sqrt(),
            "sigma_prev": one_minus_prev.sqrt(),
            "recip_alpha": (1 / self.alphas_cumprod).sqrt(),
            "noise_to_signal": (1 / self.alphas_cumprod - 1).sqrt(),
            "beta": self.betas,
            "coef1": self.posterior_mean_coef1,
            "coef2": self.posterior_mean_coef2,
        }
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def table(self, name: str, device: torch.device) -> Tensor:
        """A float32 table [T] on a device, copied there once."""
        key = (name, device)
        if key not in self._on_device:
            self._on_device[key] = self._tables[name].to(device=device, dtype=torch.float32)
        return self._on_device[key]

    def at(self, name: str, t: Tensor) -> Tensor:
        """A table's values at t [B], as float32 [B, 1, 1] on t's device."""
        return column(self.table(name, t.device)[t])

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told for t [B]: t * 1000 / T if rescaled, float32 [B]."""
        scale = 1000.0 / self.num_timesteps if self.config.rescale_timesteps else 1.0
        return t.float() * scale

    def timesteps(self, t: Tensor | int, x: Tensor) -> Tensor:
        """t as int64 [B] on x's device, for x [B, …]; one timestep serves all rows.

        Raises:
            UsageError: t is not of whole numbers, of another length, or out of 0 … T - 1 (checked
                where that costs no wait for a device).
        """
        rows = torch.as_tensor(t)
        if rows.is_floating_point() or rows.dtype == torch.bool or rows.dim() > 1:
            raise UsageError(
                "t must be whole timesteps [B] (rescaling happens inside), got "
                f"{rows.dtype} of shape {tuple(rows.shape)}"
            )
        if rows.device.type == "cpu" and rows.numel():
            low, high = int(rows.min()), int(rows.max())
            if low < 0 or high >= self.num_timesteps:
                raise UsageError(f"t must lie in 0 … {self.num_timesteps - 1}, got {low} to {high}")
        rows = rows.to(device=x.device, dtype=torch.int64)
        if rows.dim() == 1 and len(rows) != len(x):
            raise UsageError(f"t must hold one timestep a row ({len(x)}), got {len(rows)}")
        return rows.expand(len(x))

    def q_sample(
        self, x0: Tensor, t: Tensor | int, noise: Tensor | Draw, mask: Tensor | None = None
    ) -> Tensor:
        """Draw x_t from q(x_t | x_0) on target positions; source positions keep x_0.

        Args:
            x0: embeddings [B, L, d].
            t: timesteps in 0 … T - 1, [B] or one for all.
            noise: standard normal draws, like x0, or the `Draw` that names them.
            mask: [B, L], 0 on source positions; None: noise every position.
        """
        t = self.timesteps(t, x0)
        alpha, sigma = (self.table(name, x0.device)[t] for name in ("alpha", "sigma"))
        return _add_noise(x0, alpha, sigma, noise, mask)

    def q_sample_of_tokens(
        self, ids: Tensor, table: Tensor, t: Tensor | int, noise: Draw, mask: Tensor | None = None
    ) -> Tensor:
        """`q_sample` of x_0 = table[ids] for ids [B, L] and table [V, d]; x_0 is not stored."""
        t = self.timesteps(t, ids)
        alpha, sigma = (self.table(name, ids.device)[t] for name in ("alpha", "sigma"))
        return forward_diffusion_of_tokens(ids, table, alpha, sigma, mask, *noise)

    def embedding_noise(
        self, x: Tensor, noise: Tensor | Draw, mask: Tensor | None = None
    ) -> Tensor:
        """x + sigma_0 noise: DiffuSeq's x_0 around an embedding; arguments as for `q_sample`."""
        ones = torch.ones(len(x), device=x.device)
        return _add_noise(x, ones, self.table("sigma", x.device)[0] * ones, noise, mask)


def _add_noise(
    x: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | Draw, mask: Tensor | None
) -> Tensor:
    if isinstance(noise, Draw):
        return forward_diffusion(x, alpha, sigma, mask, *noise)
    noisy = column(alpha) * x + column(sigma) * noise
    return noisy if mask is None else keep_source(noisy, x, mask)


def keep_source(x: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """x [B, L, d] with the positions where mask ([B, L], or broadcast as [B, L, d]) is 0 taken
    from `source`."""
    given = mask == 0
    return torch.where(given if given.dim() == 3 else given.unsqueeze(-1), source, x)


def column(values: Tensor) -> Tensor:
    """Per-sample values [B] as [B, 1, 1], to meet [B, L, d]."""
    return values.view(-1, 1, 1)


def named_betas(name: str, steps: int) -> Tensor:
    """The float64 betas [steps] of a named schedule (DiffuSeq's names and definitions)."""
    scale = 1000 / steps
    if name == "linear":
        return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    if name == "trunc_lin":
        low, high = scale * 1e-4 + 0.01, scale * 0.02 + 0.01
        return torch.linspace(low, high, steps, dtype=torch.float64)
    if name == "pw_lin":
        knee = scale * 1e-4
        head = torch.linspace(knee + 0.01, knee, 10, dtype=torch.float64)
        tail = torch.linspace(knee, scale * 0.02, steps - 10, dtype=torch.float64)
        return torch.cat([head, tail])
    if name == "sqrt":
        return _betas_from(lambda s: 1 - math.sqrt(s + 1e-4), steps)
    if name == "cosine":
        return _betas_from(lambda s: math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2, steps)
    if name == "trunc_cos":
        first = torch.tensor([1 - _truncated_cosine(0)], dtype=torch.float64)
        return torch.cat([first, _betas_from(_truncated_cosine, steps)[:-1]])
    raise UsageError(f"unknown noise schedule {name!r}; see DiffusionConfig.schedule")


def _truncated_cosine(s: float) -> float:
    return math.cos((s + 0.1) / 1.1 * math.pi / 2) ** 2


def _betas_from(alpha_bar: Callable[[float], float], steps: int) -> Tensor:
    # beta_i = 1 - alpha_bar((i+1)/T) / alpha_bar(i/T), so the cumulative product telescopes.
    values = [
        min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), _MAX_BETA) for i in range(steps)
    ]
    return torch.tensor(values, dtype=torch.float64)
