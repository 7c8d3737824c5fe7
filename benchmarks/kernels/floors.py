"""The work of each operation: every input read once, every result written once."""

from __future__ import annotations

import torch

from benchmarks.harness.floors import Work
from benchmarks.kernels.shapes import CHANNELS, VOCABULARY, Shape


def rounding(tokens: int, precision: str, words: int = VOCABULARY, d: int = CHANNELS) -> Work:
    """Every score, the table and the tokens read once, the ids written."""
    width = 2 if precision == "bf16" else 4
    return Work(width * words * d + 4 * tokens * d + 8 * tokens, 2 * tokens * words * d, precision)


def noise(shape: Shape) -> Work:
    """One pass: nothing is read."""
    return Work(4 * shape.numel)


def forward_diffusion(shape: Shape) -> Work:
    """Two passes, x_0 read and x_t written, and the mask."""
    return Work(2 * shape.bytes + shape.tokens)


def forward_diffusion_of_tokens(shape: Shape, words: int = VOCABULARY) -> Work:
    """One pass, x_t written; ids, mask and the rows of the table read."""
    table = min(words, shape.tokens) * shape.width * shape.dtype.itemsize
    return Work(shape.bytes + 9 * shape.tokens + table)


def distillation_loss(shape: Shape) -> Work:
    """Six passes: three inputs read, three gradients written."""
    return Work(6 * shape.bytes + shape.tokens)


def linear_cross_entropy(tokens: int, dtype: torch.dtype, words: int = VOCABULARY,
                         d: int = CHANNELS) -> Work:  # fmt: skip
    """Three products, one forward and two backward; both operands read, both gradients written."""
    precision = "fp32" if dtype == torch.float32 else "bf16"
    moved = 2 * dtype.itemsize * d * (tokens + words)
    return Work(moved, 3 * 2 * tokens * words * d, precision)


def elementwise(shape: Shape, passes: int) -> Work:
    """Passes over one tensor."""
    return Work(passes * shape.bytes)
