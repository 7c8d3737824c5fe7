"""The score matching of ψ (DLM-One Eq. 3); the loss of θ (Eq. 4) is a fused operation,
`kernels/distillation_loss.py`. Means run over target positions; the source is given."""

from __future__ import annotations

from torch import Tensor

from dlmone_fast.losses.teacher import masked_mean


def score_matching_loss(x: Tensor, x0_score: Tensor, mask: Tensor) -> Tensor:
    """Denoising score matching [B] of ψ on generated x (Eq. 3), as mean squared error of x̂0.

    γ_t = 1: ψ is trained with the loss that the teacher was trained with.
    """
    return masked_mean((x - x0_score).square(), mask)
