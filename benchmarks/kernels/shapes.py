"""The shapes that are timed: those of the paper's tasks, batch by batch.

DiffuSeq's models have BERT's vocabulary, embeddings of 128 channels, sequences of 128 tokens and
an encoder of width 768. On a GPU every memory-bound operation also has a shape of at least four
times the second-level cache of an H200 (60 MB), so that it is memory which is timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

VOCABULARY = 30_522
CHANNELS = 128
LENGTH = 128
HIDDEN = 768


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of `length` positions of `width` channels."""

    batch: int
    length: int = LENGTH
    width: int = CHANNELS
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def numel(self) -> int:
        return self.tokens * self.width

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def size(self) -> tuple[int, int, int]:
        return self.batch, self.length, self.width

    def __str__(self) -> str:
        size = "×".join(map(str, self.size))
        return f"{size} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Tokens:
    """`count` positions against the whole vocabulary."""

    count: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.count} tokens {str(self.dtype).removeprefix('torch.')}"


_BF16 = torch.bfloat16

ROUNDING = {
    "cpu": [Tokens(128), Tokens(1024)],
    "cuda": [Tokens(128), Tokens(1024), Tokens(128 * 128), Tokens(512 * 128)],
}
NOISE = {
    "cpu": [Shape(1), Shape(64)],
    "cuda": [Shape(1), Shape(128), Shape(8192)],
}
FORWARD_DIFFUSION = {
    "cpu": [Shape(64)],
    "cuda": [Shape(128), Shape(8192), Shape(8192, dtype=_BF16)],
}
DISTILLATION_LOSS = {
    "cpu": [Shape(64)],
    "cuda": [Shape(128), Shape(4096), Shape(8192, dtype=_BF16)],
}
LINEAR_CROSS_ENTROPY = {
    "cpu": [Tokens(1024)],
    "cuda": [Tokens(64 * 128), Tokens(64 * 128, _BF16)],
}
HIDDEN_STATES = {
    "cpu": [Shape(8, width=HIDDEN)],
    "cuda": [Shape(1, width=HIDDEN, dtype=_BF16), Shape(2048, width=HIDDEN, dtype=_BF16)],
}
FEED_FORWARD = {
    "cpu": [Shape(8, width=4 * HIDDEN)],
    "cuda": [Shape(1, width=4 * HIDDEN, dtype=_BF16), Shape(512, width=4 * HIDDEN, dtype=_BF16)],
}
