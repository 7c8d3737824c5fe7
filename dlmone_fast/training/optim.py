"""Optimisers, learning rates, moving averages, and updates that refuse non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dlmone_fast.errors import DivergedError


def learning_rate(base: float, step: int, steps: int, warmup: int, decay: str) -> float:
    """The learning rate of update `step` (from 0): linear warm-up, then decay to zero."""
    if step < warmup:
        return base * (step + 1) / warmup
    if decay == "constant":
        return base
    # DiffuSeq anneals by step / steps from the first update on; without warm-up so does this.
    done = (step - warmup) / max(1, steps - warmup)
    return base * (1 - done if decay == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use one learning rate for all of an optimiser's parameters."""
    for group in optimizer.param_groups:
        group["lr"] = value


def adamw(
    module: nn.Module, rate: float, beta1: float, beta2: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with epsilon 1e-8 over a module's trainable parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    # One pass over each tensor: a tenth of the time of one operation after the other on a CPU.
    return torch.optim.AdamW(
        parameters, lr=rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=True
    )


class Ema:
    """Exponential moving average of a module's parameters, one update a training step.

    With `warmup` the decay of step k (from 0) is at most (1 + k) / (10 + k), so that the average
    forgets the initial weights within a few steps (TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's parameters after a training step."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        current = [p.detach() for _, p in module.named_parameters()]
        torch._foreach_lerp_(list(self.values.values()), current, 1 - decay)


class UpdateGuard:
    """Applies gradients only where loss, gradients and weights are finite.

    A step that is not finite changes no parameter and no optimiser state; it is counted, and
    after `limit` in a row of one network DivergedError is raised.

    Args:
        limit: how many in a row are too many.
        watched: every weight that a loss depends on, of the other networks too. Behind a tanh or
            a clamp an infinite one gives a finite loss and finite gradients.
    """

    def __init__(self, limit: int, watched: Iterable[Tensor] = ()) -> None:
        self.limit = limit
        self.watched = list(watched)
        self.skipped = 0
        # By network: good steps of ψ must not hide that every step of θ fails.
        self.in_a_row: dict[str, int] = {}

    def apply(
        self,
        what: str,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        clip_norm: float,
        clip_value: float = 0.0,
    ) -> float | None:
        """One optimiser step; the gradient norm before clipping, or None for a skipped step."""
        parameters = list(_parameters(optimizer))
        norm = _gradient_norm(parameters)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if self.watched:
            finite &= torch.isfinite(torch.nn.utils.get_total_norm(self.watched)).to(finite.device)
        if not bool(finite):
            optimizer.zero_grad(set_to_none=True)
            self._count(what)
            return None
        _clip(parameters, norm, clip_norm, clip_value)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.in_a_row[what] = 0
        return float(norm)

    def state(self) -> dict[str, Any]:
        """The counts, for a checkpoint: a run that fails for good ends however often it resumes."""
        return {"skipped": self.skipped, "bad_in_a_row": dict(self.in_a_row)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue the counts of `state`."""
        self.skipped = state["skipped"]
        self.in_a_row = dict(state.get("bad_in_a_row", {}))

    def _count(self, what: str) -> None:
        self.skipped += 1
        self.in_a_row[what] = self.in_a_row.get(what, 0) + 1
        if self.in_a_row[what] >= self.limit:
            raise DivergedError(
                f"{what}: loss, gradient or weights were not finite {self.limit} steps in a row"
            )


def _gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)


def _clip(
    parameters: list[nn.Parameter], norm: Tensor, clip_norm: float, clip_value: float
) -> None:
    if clip_value:
        torch.nn.utils.clip_grad_value_(parameters, clip_value, foreach=True)
    if clip_norm:
        # By value first: what is left has a smaller norm.
        norm = _gradient_norm(parameters) if clip_value else norm
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm, foreach=True)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]
