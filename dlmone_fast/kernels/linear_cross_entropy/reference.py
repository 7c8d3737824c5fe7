"""Linear cross-entropy in a few lines of torch: what a backend's result is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


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
