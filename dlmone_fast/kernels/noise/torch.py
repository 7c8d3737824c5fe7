"""Noise in torch, on any device: Philox 4x32-10 and Box-Muller (`op.py` has the formulas)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# Counters a pass of the generator: bounds the memory of its int64 temporaries (0.5 MB each).
# 2^16 measured fastest on a CPU: smaller passes pay the call overhead, larger ones the cache.
_COUNTERS_PER_PASS = 1 << 16


def normals(draws: Tensor, stream: int, positions: int, channels: int) -> Tensor:
    blocks = -(-channels // 4)
    out = torch.empty(len(draws), positions, blocks * 4, dtype=torch.float32, device=draws.device)
    flat = out.view(len(draws), positions * blocks, 4)
    index = torch.arange(positions * blocks, dtype=torch.int64, device=draws.device)
    rows_per_pass = max(1, _COUNTERS_PER_PASS // max(1, positions * blocks))
    for first in range(0, len(draws), rows_per_pass):
        part = slice(first, first + rows_per_pass)
        box_muller(_words_at(draws[part], stream, index), flat[part])
    return out[..., :channels].contiguous()


def words(draws: Tensor, stream: int, first: int, count: int) -> Tensor:
    index = torch.arange(first, first + count, dtype=torch.int64, device=draws.device)
    return torch.stack(_words_at(draws, stream, index), dim=-1)


def _words_at(draws: Tensor, stream: int, index: Tensor) -> list[Tensor]:
    """The four words of every row at the counters `index` [n], each [B, n]."""
    k0, k1, samples, steps = draws[:, :, None].unbind(1)
    return rounds((k0, k1), (stream, samples, steps, index))


def rounds(key: tuple[Tensor | int, Tensor | int], counter: Sequence[Tensor | int]) -> list[Tensor]:
    # int64 products wrap, but keep the 64 bits of the unsigned product: the arithmetic shift
    # and the mask then give its exact high word. Words 1 and 3 are masked only by the next
    # round's mask, which saves two passes a round.
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((product0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = _wrap(product1), _wrap(product0)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [_tensor(word) for word in (c0, c1 & _MASK, c2, c3 & _MASK)]


def _tensor(word: Tensor | int) -> Tensor:
    # Numbers alone are drawn on the CPU, whatever torch's default device is.
    return word if isinstance(word, Tensor) else torch.tensor(word, device="cpu")


def _wrap(product: Tensor | int) -> Tensor | int:
    # A counter word given as a Python int does not wrap at 64 bits by itself.
    return product & _MASK if isinstance(product, int) else product


def box_muller(words: Sequence[Tensor], out: Tensor) -> None:
    for first, (radius_word, angle_word) in enumerate((words[:2], words[2:])):
        radius = _unit_interval(radius_word).log_().mul_(-2.0).sqrt_()
        angle = _unit_interval(angle_word).mul_(2.0 * math.pi)
        out[..., 2 * first] = angle.cos().mul_(radius)
        out[..., 2 * first + 1] = angle.sin_().mul_(radius)


def _unit_interval(word: Tensor) -> Tensor:
    # 2^-32 scales exactly, so the two fp32 roundings are the conversion and the sum. The sum
    # reaches 1.0 but never 0.0: the logarithm is finite and not positive.
    return word.float().mul_(2.0**-32).add_(2.0**-33).double()
