"""Parts of the transformer, chosen by what their backward passes cost on a CPU.

Attention is written as plain products: for short sequences in bf16 the backward pass of torch's
fused attention takes ten times as long. Dropout makes its masks of random bytes: eight elements
from one draw, where torch draws for each.

B = batch, L = target positions, S = source positions, N = heads, D = width of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-12
_BYTE = 256


class KeysValues(NamedTuple):
    """Keys and values [B, N, L, D] of one attention."""

    keys: Tensor
    values: Tensor


class Dropout(nn.Module):
    """Dropout at a rate that is a multiple of 1/256, the nearest one to `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropped = round(rate * _BYTE)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropped:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.dropped
        return x * kept.to(x.dtype).mul_(_BYTE / (_BYTE - self.dropped))


def attend(query: Tensor, memory: KeysValues, mask: Tensor | None) -> Tensor:
    """Attention [B, L, N·D] of queries [B, N, L, D]; `mask` is added to the scores [B, N, L, S]."""
    scores = query @ memory.keys.transpose(-1, -2)
    scores = scores * (1 / math.sqrt(query.shape[-1]))
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ memory.values).transpose(1, 2).flatten(2)


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, KeysValues]:
        """Queries, and keys and values, [B, N, L, D] of x [B, L, N·D]."""
        q, k, v = (_by_head(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return q, KeysValues(k, v)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, memory = self.project(x)
        mixed: Tensor = self.output(attend(query, memory, mask))
        return mixed


class CrossAttention(nn.Module):
    """Attention of the target to the encoded source."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.memory = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def project(self, encoded: Tensor) -> KeysValues:
        """Keys and values [B, N, S, D] of the encoded source [B, S, N·D]."""
        k, v = (_by_head(part, self.heads) for part in self.memory(encoded).chunk(2, -1))
        return KeysValues(k, v)

    def forward(self, x: Tensor, memory: KeysValues, mask: Tensor | None) -> Tensor:
        query = _by_head(self.query(x), self.heads)
        mixed: Tensor = self.output(attend(query, memory, mask))
        return mixed


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.gelu(self.up(x)))
        return result


class Residual(nn.Module):
    """LayerNorm and dropout around one part of a layer, in the order of pre- or of post-norm."""

    def __init__(self, width: int, dropout: float, pre: bool) -> None:
        super().__init__()
        self.pre = pre
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(dropout)

    def before(self, x: Tensor) -> Tensor:
        """The part's input."""
        return self.norm(x) if self.pre else x

    def after(self, x: Tensor, part: Tensor) -> Tensor:
        """The sum that goes on, of the layer's input and the part's output."""
        summed = x + self.dropout(part)
        return summed if self.pre else self.norm(summed)
