"""Token embeddings, the tied decoder, and the sinusoidal embedding of time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlmone_fast.config import ModelConfig


class TokenEmbedding(nn.Module):
    """The embedding table E [V, d] and the decoder h·Eᵀ + b that is tied to it.

    With `normalize_embedding` the rows of the stored weight are scaled to norm sqrt(d); all rows
    are divided by the noise-scale factor F. DiffuSeq has neither (F = 1).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config.vocab_size, config.embedding_dim))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.in_slots = config.in_slots
        self.normalize = config.normalize_embedding
        self.noise_scale = config.noise_scale

    def table(self) -> Tensor:
        """The table E [V, d] in which diffusion and rounding happen."""
        table: Tensor = self.weight
        if self.normalize:
            table = F.normalize(table, dim=-1) * math.sqrt(table.shape[-1])
        return table if self.noise_scale == 1 else table / self.noise_scale

    def lookup(self) -> Tensor:
        """The rows that ids name: the table [V, d], and with a source in slots a zero row more,
        for positions that hold nothing (`data/slots.py`)."""
        table = self.table()
        return F.pad(table, (0, 0, 0, 1)) if self.in_slots else table

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [B, L, d] of ids [B, L]."""
        return F.embedding(ids, self.lookup())

    def logits(self, h: Tensor) -> Tensor:
        """Decoder logits [..., V] of h [..., d]."""
        return F.linear(h, self.table(), self.bias)


def time_features(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features [B, width] of t [B]: cosines first, 10,000 as the longest period.

    Always float32: a table of frequencies rounded to bfloat16 costs 8 % relative error.
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * index / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
