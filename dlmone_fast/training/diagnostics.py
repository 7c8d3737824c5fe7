"""Diagnostics of distillation: is the discriminator useful, do the two terms balance?

What they are for: a discriminator that is right everywhere is dead weight, one that is right
nowhere is useless; the adversarial term should neither drown nor vanish beside the SiD loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dlmone_fast.training.ranks import Ranks

_BINS = 4


class DiscriminatorAccuracy:
    """Share of tokens that the discriminator tells right, by quarter of the timesteps."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self.right = torch.zeros(_BINS)
        self.count = torch.zeros(_BINS)
        # Of this rank alone: right, count.
        self._added = torch.zeros(2, _BINS)

    @torch.no_grad()
    def add(
        self, t: Tensor, real: Tensor, real_mask: Tensor, fake: Tensor, fake_mask: Tensor
    ) -> None:
        """Count logits [B, L] of real and generated text at t [B] on target positions."""
        bins = (t * _BINS // self.num_timesteps).cpu()
        for right, mask in (((real > 0), real_mask != 0), ((fake < 0), fake_mask != 0)):
            self._added[0].index_add_(0, bins, (right & mask).sum(1).float().cpu())
            self._added[1].index_add_(0, bins, mask.sum(1).float().cpu())

    def merge(self, ranks: Ranks) -> None:
        """Count what was added on all ranks."""
        right, count = ranks.sum(self._added)
        self.right += right
        self.count += count
        self._added.zero_()

    def take(self) -> dict[str, float]:
        """The accuracies of what was merged since the last call, for the bins that were seen."""
        seen = [i for i in range(_BINS) if self.count[i] > 0]
        shares = {f"accuracy_t{i}": float(self.right[i] / self.count[i]) for i in seen}
        self.right.zero_()
        self.count.zero_()
        return shares


def gradient_norms(terms: Mapping[str, Tensor], x: Tensor, mask: Tensor) -> dict[str, float]:
    """Norm of each term's gradient at the generated x [B, L, d], a mean over the batch's rows.

    Only target positions of mask [B, L] count: at the others x is the given source, which no
    gradient can change.
    """
    norms = {}
    for name, term in terms.items():
        if term.requires_grad:
            (gradient,) = torch.autograd.grad(term.sum(), x, retain_graph=True)
            gradient = gradient * (mask != 0).unsqueeze(-1)
            norms[f"{name}_gradient_at_x"] = float(gradient.flatten(1).norm(dim=1).mean())
    return norms
