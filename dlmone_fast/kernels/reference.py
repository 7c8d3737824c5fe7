"""Every operation in a few lines of torch: what a backend's result is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_token(x: Tensor, embedding: Tensor) -> Tensor:
    """ids [...] = argmin_v |x - E_v|^2 for x [..., d], E [V, d]; lowest id among equals.

    Computed in fp64 from the differences themselves, one token at a time: exact and slow.
    """
    rows = x.reshape(-1, x.shape[-1]).double()
    table = embedding.double()
    ids = [squared_distances(row, table).argmin() for row in rows]
    return torch.stack(ids).view(x.shape[:-1]) if ids else rows.new_empty(x.shape[:-1]).long()


def margin(x: Tensor, embedding: Tensor) -> Tensor:
    """fp64 [...]: how much further, in squared distance, the second-nearest row is.

    Infinite without a second finite distance, 0 without a first.
    """
    rows = x.reshape(-1, x.shape[-1])
    margins = rows.new_zeros(len(rows), dtype=torch.float64)
    for i, row in enumerate(rows):
        distances = squared_distances(row, embedding).sort().values
        if distances[0].isfinite():
            margins[i] = distances[1] - distances[0] if len(distances) > 1 else torch.inf
    return margins.view(x.shape[:-1])


def squared_distances(x: Tensor, rows: Tensor) -> Tensor:
    """|x - rows|^2 over the last dimension, fp64; infinite where it is not a number.

    The squares are summed by folding halves onto each other (zeros up to a power of two), an
    order that every device can follow, so that backends agree to the last bit.
    """
    squares = (x.double() - rows.double()).square()
    width = 1 << (squares.shape[-1] - 1).bit_length()
    squares = torch.nn.functional.pad(squares, (0, width - squares.shape[-1]))
    while width > 1:
        width //= 2
        squares = squares[..., :width] + squares[..., width:]
    return squares.squeeze(-1).nan_to_num(nan=torch.inf, posinf=torch.inf)


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
    """fp64 [B, positions, channels]: Box and Muller's normals, as `kernels/noise.py` specifies."""
    blocks = -(-channels // 4)
    words = philox_words(draws, stream, 0, positions * blocks)
    unit = (words.float() * 2.0**-32 + 2.0**-33).double()
    radius, angle = (-2 * unit[..., 0::2].log()).sqrt(), 2 * torch.pi * unit[..., 1::2]
    noise = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return noise.reshape(len(draws), positions, 4 * blocks)[..., :channels]


def forward_diffusion(
    x0: Tensor, alpha: Tensor, sigma: Tensor, mask: Tensor | None, noise: Tensor
) -> Tensor:
    """x_t = alpha x_0 + sigma noise where mask is not 0, x_0 elsewhere; in the widest dtype."""
    x_t = alpha[:, None, None] * x0 + sigma[:, None, None] * noise
    return x_t if mask is None else torch.where(mask[..., None] != 0, x_t, x0.to(x_t.dtype))
