"""Philox and Box-Muller in a few lines of torch: what a backend's result is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def philox_words(draws: Tensor, stream: int, first: int, count: int) -> Tensor:
    """Philox 4x32-10 words int64 [B, count, 4] of int64 draws [B, 4] = (k0, k1, sample, step)."""
    k0, k1, sample, step = draws[:, :, None].unbind(1)
    c3 = torch.arange(first, first + count, device=draws.device).expand(len(draws), count)
    c0, c1, c2 = torch.full_like(c3, stream), sample.expand_as(c3), step.expand_as(c3)
    for _ in range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high1, low1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a b, in halves of a that keep every product below 2^63."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def normal(draws: Tensor, stream: int, positions: int, channels: int) -> Tensor:
    """fp64 [B, positions, channels]: Box and Muller's normals, as `noise/op.py` specifies."""
    blocks = -(-channels // 4)
    words = philox_words(draws, stream, 0, positions * blocks)
    unit = (words.float() * 2.0**-32 + 2.0**-33).double()
    radius, angle = (-2 * unit[..., 0::2].log()).sqrt(), 2 * torch.pi * unit[..., 1::2]
    noise = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return noise.reshape(len(draws), positions, 4 * blocks)[..., :channels]
