"""The fused blocks in a few lines of torch: what a backend's result is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + residual over the last dimension, and the sum itself, fp64."""
    total = x.double() + residual.double()
    centred = total - total.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation * weight.double() + bias.double(), total


def input_layer_norm(
    projected: Tensor, position: Tensor, time: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm of projected [B, L, H] + position [L', H] + time [B, H], fp64."""
    added = position[: projected.shape[1]].double() + time.double()[:, None]
    return add_layer_norm(projected, added, weight, bias, eps)[0]


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """v Phi(v) for v = x + bias and the standard normal distribution function Phi, fp64."""
    v = x.double() + bias.double()
    return 0.5 * v * torch.erfc(-v / 2**0.5)


def bias_tanh(x: Tensor, bias: Tensor) -> Tensor:
    """tanh(x + bias), fp64."""
    return torch.tanh(x.double() + bias.double())
