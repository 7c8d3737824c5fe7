"""How much what stands behind the end of a text counts in the losses of distillation.

Most target positions of a short text are [PAD] (`data/layouts.py`), which a student learns first
and can fall back to. A weight below 1 lets each of them into a loss with that probability: the
loss mask stays binary, and a position's share of the sum has the weight as its expectation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlmone_fast.kernels.noise import random_bits


def behind_end(ids: Tensor, mask: Tensor, sep_id: int) -> Tensor:
    """Target positions behind the first [SEP] of the target, bool [B, L]; none without a [SEP].

    Args:
        ids: [B, L].
        mask: [B, L], 0 on source positions, whose separators do not count.
        sep_id: the id of [SEP].
    """
    ends = (ids == sep_id) & (mask != 0)
    return ends.cumsum(1) > ends.long()


def thin_padding(
    mask: Tensor, behind: Tensor, weight: float, seed: int, stream: int, step: int, slots: Tensor
) -> Tensor:
    """The mask [B, L] with each position of `behind` [B, L] kept with probability `weight`.

    The draw of a position is a function of (seed, stream, step, slot, position): slots [B].
    """
    places = torch.arange(mask.shape[1])
    words = random_bits(seed, stream, slots.unsqueeze(1), step, places)
    dropped = (words >= round(weight * 2**32)).to(mask.device) & behind
    return mask.masked_fill(dropped, 0)
