"""Adversarial terms of DLM-One (Eq. 5 and 6), written as cross-entropies to minimise.

The paper prints log-likelihoods without the minus sign. Logits come per token and are averaged
over target positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dlmone_fast.losses.teacher import masked_mean


def discriminator_loss(
    real_logits: Tensor, real_mask: Tensor, fake_logits: Tensor, fake_mask: Tensor, clamp: float
) -> Tensor:
    """Discriminator loss [B] in the ψ step (Eq. 5): real towards 1, generated towards 0."""
    real = _cross_entropy(real_logits, real_mask, 1.0, clamp)
    fake = _cross_entropy(fake_logits, fake_mask, 0.0, clamp)
    return 0.5 * (real + fake)


def generator_adversarial_loss(fake_logits: Tensor, mask: Tensor, clamp: float) -> Tensor:
    """Adversarial loss [B] in the θ step (Eq. 6): generated towards 1."""
    return _cross_entropy(fake_logits, mask, 1.0, clamp)


def _cross_entropy(logits: Tensor, mask: Tensor, label: float, clamp: float) -> Tensor:
    if clamp:
        logits = logits.clamp(-clamp, clamp)
    target = torch.full_like(logits, label)
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return masked_mean(losses, mask)
