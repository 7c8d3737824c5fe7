"""The SiD loss with its weight and its three gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.harness import checks
from benchmarks.harness.race import COMPILED, EAGER, Race, ours
from benchmarks.kernels import floors, peers, shapes
from dlmone_fast.kernels import reference
from dlmone_fast.kernels.distillation_loss import distillation_loss

_MU, _FLOOR = 1.2, 0.05
_ROWS_CHECKED = 4


@pytest.mark.shapes(shapes.DISTILLATION_LOSS)
def test_distillation_loss(race: Race, shape: shapes.Shape, device: torch.device) -> None:
    """Forward and backward over [B, 128, 128]; the second half of each sequence is the target."""
    x, teacher, score = (torch.randn(shape.size, device=device).to(shape.dtype) for _ in range(3))
    mask = (torch.arange(shape.length, device=device) >= shape.length // 2).expand(shape.size[:2])
    mask = mask.clone()
    predictions = (x, x + 0.3 * teacher, x + 0.3 * score)
    inputs = tuple(t.detach().requires_grad_() for t in predictions)

    def own(backend: str) -> tuple[Tensor, ...]:
        def loss(x: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
            return distillation_loss(
                x, teacher, score, mask, mu=_MU, weight_floor=_FLOOR, kernel_backend=backend
            )[0]

        return _with_gradients(loss, inputs)

    def plain(x: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
        return peers.distillation_loss(x, teacher, score, mask, _MU, _FLOOR)

    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    race(
        "distillation loss",
        shape,
        {
            **ours("distillation_loss", own),
            EAGER: lambda: _with_gradients(plain, inputs),
            COMPILED: lambda: _with_gradients(compiled, inputs),
        },
        checks.close_to(*_exact(inputs, mask)),
        floors.distillation_loss(shape),
    )


def _with_gradients(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Losses [B] and the gradients of their sum."""
    losses = loss(*inputs)
    return (losses.detach(), *torch.autograd.grad(losses.sum(), inputs))


def _exact(inputs: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, ...]:
    """Losses and gradients of the first rows in fp64."""
    first = slice(_ROWS_CHECKED)
    rows = tuple(t[first].detach().double().requires_grad_() for t in inputs)

    def loss(x: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
        return reference.distillation_loss(x, teacher, score, mask[first], "sid", _MU, _FLOOR)[0]

    return _with_gradients(loss, rows)
