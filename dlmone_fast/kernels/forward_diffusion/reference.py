"""Forward diffusion in a few lines of torch: what a backend's result is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def forward_diffusion(
    x0: Tensor, alpha: Tensor, sigma: Tensor, mask: Tensor | None, noise: Tensor
) -> Tensor:
    """x_t = alpha x_0 + sigma noise where mask is not 0, x_0 elsewhere; in the widest dtype."""
    x_t = alpha[:, None, None] * x0 + sigma[:, None, None] * noise
    return x_t if mask is None else torch.where(mask[..., None] != 0, x_t, x0.to(x_t.dtype))
