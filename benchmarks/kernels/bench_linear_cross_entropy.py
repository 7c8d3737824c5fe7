"""Cross-entropy of the tied output layer over BERT's vocabulary, with both gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.harness import checks
from benchmarks.harness.race import COMPILED, EAGER, Race, ours
from benchmarks.kernels import floors, peers, shapes
from dlmone_fast.kernels import reference
from dlmone_fast.kernels.linear_cross_entropy import linear_cross_entropy


@pytest.mark.shapes(shapes.LINEAR_CROSS_ENTROPY)
def test_linear_cross_entropy(race: Race, shape: shapes.Tokens, device: torch.device) -> None:
    """Forward and backward: the sum of the losses, dh [N, 128] and dE [V, 128]."""
    table = torch.randn(shapes.VOCABULARY, shapes.CHANNELS, device=device) / shapes.CHANNELS**0.5
    ids = torch.randint(shapes.VOCABULARY, (shape.count,), device=device)
    h = table[ids] * 4 + torch.randn(shape.count, shapes.CHANNELS, device=device)
    inputs = tuple(t.to(shape.dtype).requires_grad_() for t in (h, table))

    def own(backend: str) -> tuple[Tensor, ...]:
        loss = partial(linear_cross_entropy, targets=ids, kernel_backend=backend)
        return _with_gradients(loss, inputs)

    compiled = torch.compile(peers.linear_cross_entropy, fullgraph=True, dynamic=False)
    others = {
        EAGER: peers.linear_cross_entropy,
        COMPILED: compiled,
        **peers.fused_linear_cross_entropies(),
    }
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    exact = _with_gradients(partial(reference.linear_cross_entropy, targets=ids), wide)
    race(
        "linear cross-entropy",
        shape,
        {
            **ours("linear_cross_entropy", own),
            **{name: _bound(loss, inputs, ids) for name, loss in others.items()},
        },
        checks.close_to(*exact),
        floors.linear_cross_entropy(shape.count, shape.dtype),
    )


def _bound(
    loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], ids: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: _with_gradients(lambda h, table: loss(h, table, ids), inputs)


def _with_gradients(
    loss: Callable[[Tensor, Tensor], Tensor], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The sum of the losses and its gradients."""
    total = loss(*inputs).sum()
    return (total.detach(), *torch.autograd.grad(total, inputs))
