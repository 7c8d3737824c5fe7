"""Forward diffusion in torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from dlmone_fast.kernels.noise import normal_of_draws


def forward_diffusion(
    source: Tensor,
    ids: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    targets: Tensor | None,
    draws: Tensor,
    stream: int,
    noise_backend: str,
) -> Tensor:
    """x_t [B, L, d], with the noise of that backend."""
    x0 = source if ids is None else source[ids]
    _, length, channels = x0.shape
    noise = normal_of_draws(draws, stream, length, channels, kernel_backend=noise_backend)
    x_t = noise.mul_(sigma[:, None, None]).add_(x0.float() * alpha[:, None, None])
    x_t = x_t.to(x0.dtype)
    if targets is not None:
        x_t = torch.where(targets[..., None], x_t, x0)
    return x_t.contiguous()


def scale_targets(
    grad: Tensor, alpha: Tensor, targets: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """The backward pass: alpha grad on target positions, grad elsewhere, in `dtype` or grad's."""
    factor = alpha[:, None]
    if targets is not None:
        factor = torch.where(targets, factor, 1.0)
    return (grad * factor[..., None]).to(dtype or grad.dtype).contiguous()
