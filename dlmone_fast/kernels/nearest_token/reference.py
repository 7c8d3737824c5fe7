"""Nearest-token rounding in a few lines of torch: what a backend's result is compared with."""

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
