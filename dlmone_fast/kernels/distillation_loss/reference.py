"""The distillation loss in a few lines of torch: what a backend's result is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def distillation_loss(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    form: str,
    mu: float,
    weight_floor: float,
    multiplier: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and weight [B] in fp64; autograd through the loss gives the gradients."""
    losses, weights = [], []
    for row, target in enumerate(mask != 0):
        x_b, teacher, score = (part[row][target].double() for part in (x, x0_teacher, x0_score))
        distance = (x_b - teacher).detach().abs()
        weight = distance.mean().clamp(min=weight_floor) if distance.numel() else weight_floor
        a, r = teacher - score, score - x_b
        terms = -a.detach() * x_b if form == "kl" else (1 - mu) * a * a + a * r
        h = 1.0 if multiplier is None else multiplier[row].detach().double()
        losses.append(h * terms.sum() / (weight * max(1, terms.numel())))
        weights.append(torch.as_tensor(weight, dtype=torch.float64, device=x.device))
    return torch.stack(losses), torch.stack(weights)
