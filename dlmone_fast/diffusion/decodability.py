"""At which noise a token can still be read off x_t alone, without its neighbours.

x_t = alpha e + sigma noise carries a row e of norm sqrt(d) / F over d Gaussian channels of signal
to noise SNR = alpha² / sigma². Choosing among V tokens needs SNR · d / F² = 2 ln V: with less
noise than that the nearest embedding row is nearly always the right one, whatever the context,
and with more it hardly ever is. (The row-normalised table makes every token's norm the same.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlmone_fast.diffusion.schedule import Schedule


def critical_log_snr(embedding_dim: int, vocab_size: int, noise_scale: float) -> float:
    """ln SNR = ln(2 F² ln V / d): about where half of the tokens are decodable without context.

    Args:
        embedding_dim: d.
        vocab_size: V, at least 2.
        noise_scale: F, by which the embedding table is divided (`model.noise_scale`).
    """
    return math.log(2 * noise_scale**2 * math.log(vocab_size) / embedding_dim)


def timestep_at(schedule: Schedule, log_snr: float) -> int:
    """The timestep in 0 … T - 1 whose ln(alpha² / sigma²) is nearest; its ends beyond them."""
    return int(nearest_timesteps(schedule, torch.tensor([log_snr], dtype=torch.float64)))


def nearest_timesteps(schedule: Schedule, log_snr: Tensor) -> Tensor:
    """`timestep_at` of a float64 tensor of any shape, as int64; the less noisy one of a tie."""
    noise = -torch.logit(schedule.alphas_cumprod)
    return torch.searchsorted((noise[1:] + noise[:-1]) / 2, -log_snr)
