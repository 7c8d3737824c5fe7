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


def distillation_loss(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    form: str,
    mu: float,
    weight_floor: float,
    multiplier: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and weight [B] in fp64; autograd through the loss gives the gradients."""
    losses, weights = [], []
    for row, target in enumerate(mask != 0):
        x_b, teacher, score = (part[row][target].double() for part in (x, x0_teacher, x0_score))
        distance = (x_b - teacher).detach().abs()
        weight = distance.mean().clamp(min=weight_floor) if distance.numel() else weight_floor
        a, r = teacher - score, score - x_b
        terms = -a.detach() * x_b if form == "kl" else (1 - mu) * a * a + a * r
        h = 1.0 if multiplier is None else multiplier[row].detach().double()
        losses.append(h * terms.sum() / (weight * max(1, terms.numel())))
        weights.append(torch.as_tensor(weight, dtype=torch.float64, device=x.device))
    return torch.stack(losses), torch.stack(weights)


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


def linear_cross_entropy(
    h: Tensor,
    embedding: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """fp64 [...]: -log softmax(h E^T + b)[target] where mask is not 0, else 0."""
    logits = h.double() @ embedding.double().T
    if bias is not None:
        logits = logits + bias.double()
    selected = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask != 0
    ids = torch.where(selected, targets, 0)[..., None]
    losses = logits.logsumexp(-1) - logits.gather(-1, ids).squeeze(-1)
    return torch.where(selected, losses, 0.0)


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
