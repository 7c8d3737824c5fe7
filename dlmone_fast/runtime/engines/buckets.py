"""Batch sizes for what is prepared once a size: few of them, and padding to reach them."""

from __future__ import annotations

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def bucket_of(rows: int) -> int:
    """The smallest bucket that holds the rows.

    Raises:
        UsageError: there is none; `parts_of` splits such a batch.
    """
    for bucket in BUCKETS:
        if 1 <= rows <= bucket:
            return bucket
    raise UsageError(f"rows must lie in 1 … {BUCKETS[-1]} for one bucket, got {rows}")


def parts_of(rows: int, largest: int = BUCKETS[-1]) -> list[tuple[int, int]]:
    """(first, last) of parts of at most `largest` rows that make up the batch, in order."""
    return [(first, min(first + largest, rows)) for first in range(0, rows, largest)]


def padded(x: Tensor, rows: int, dim: int = 0) -> Tensor:
    """x with copies of its first row behind it, up to a number of rows.

    A copy costs what any row costs and can be neither NaN nor out of range where the batch is not.
    """
    missing = rows - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.narrow(dim, 0, 1).expand(shape)], dim)
