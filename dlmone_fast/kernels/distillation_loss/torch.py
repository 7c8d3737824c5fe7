"""The distillation loss in torch, on any device (`op.py` has the formulas)."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    multiplier: Tensor | None,
    factor: float,
    kl: bool,
    mu: float,
    floor: float,
    count: int,
) -> list[Tensor]:
    """loss, w, s, all fp32 [B], and the first `count` gradients of the summed loss."""
    target = mask != 0
    distance = (x.float() - x0_teacher).abs_().sum(-1)
    a = x0_teacher.float() - x0_score
    if kl:
        value = a.mul_(x).sum(-1).neg_()
    else:
        r = x0_score.float() - x
        value = r.add_(a, alpha=1 - mu).mul_(a).sum(-1)
    # Sums by position first: a choice between [B, L] numbers keeps source positions out.
    distance, value = (torch.where(target, part, 0).sum(1) for part in (distance, value))
    n = target.sum(1) * x.shape[2]
    weight = (distance / n.clamp(min=1)).clamp_(min=floor)
    scale = factor / (weight * n.clamp(min=1))
    scale = torch.where(n > 0, scale if multiplier is None else scale * multiplier, 0)
    made = gradients(x, x0_teacher, x0_score, mask, scale, None, mu, count)
    return [value * scale, weight, scale, *made]


def gradients(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    scale: Tensor,
    upstream: Tensor | None,
    mu: float,
    count: int,
) -> list[Tensor]:
    """The first `count` gradients times `upstream` [B], from the inputs and s [B]."""
    if not count:
        return []
    target = (mask != 0).unsqueeze(-1)
    s = (scale if upstream is None else scale * upstream).view(-1, 1, 1)
    # By position, since 0 times a scale that is not finite is not 0.
    s = torch.where(target, s, 0)
    a = _only(target, x0_teacher.float() - x0_score)
    if count == 1:
        return [a.mul_(s).neg_().to(x.dtype).contiguous()]
    of_teacher = _only(target, x0_score.float() - x).add_(a, alpha=2 * (1 - mu)).mul_(s)
    of_x = a.mul_(s).neg()
    made = [of_x, of_teacher, a.sub_(of_teacher)]
    return [part.to(x.dtype).contiguous() for part in made]


def _only(target: Tensor, values: Tensor) -> Tensor:
    """fp32 values [B, L, d], overwritten with 0 where target [B, L, 1] is false."""
    # On the bits, as 0 times NaN is NaN; masked_fill_ takes several times longer on CPUs.
    values.view(torch.int32).bitwise_and_(-target.int())
    return values
