"""A compiler plans with the strides that fake kernels promise: real results must have them.

torch.library.opcheck compares strides on GPUs only, and only inductor asserts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from dlmone_fast.kernels import dispatch, native
from dlmone_fast.kernels.blocks import op as blocks
from dlmone_fast.kernels.distillation_loss import op as distillation
from dlmone_fast.kernels.forward_diffusion import op as forward_diffusion
from dlmone_fast.kernels.linear_cross_entropy import op as cross_entropy
from dlmone_fast.kernels.nearest_token import op as nearest_token
from dlmone_fast.kernels.noise import op as noise
from dlmone_fast.kernels.triton import support


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def permuted(tensor: Tensor) -> Tensor:
    """The same numbers, stored with the last dimension first."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


B, L, D, V = 3, 4, 8, 6
X, Y, Z = (permuted(random(B, L, D) + i) for i in range(3))
H, TABLE, GRAD = permuted(random(B * L, D)), permuted(random(V, D)), random(B * L)
IDS = permuted(torch.arange(B * L).view(B, L) % V)
MASK = permuted((torch.arange(B * L).view(B, L) % 3) > 0)
ONES, VECTOR = torch.ones(B), random(D)
TARGETS, SELECTED = IDS.reshape(-1), MASK.reshape(-1)
DRAWS = permuted(torch.arange(4 * B).view(B, 4))
STATISTICS = torch.ones(2, B * L)

Arguments = Callable[[str], tuple[Any, ...]]


def linear_backward(name: str, wants: tuple[bool, ...], selected: Tensor | None) -> tuple[Any, ...]:
    saved = (H, TABLE, None, TARGETS, selected)
    _, statistics, kept = cross_entropy._forward(*saved, False, name)
    return (GRAD, *saved, statistics, kept, *wants, name)


CASES: dict[str, tuple[str, Any, Arguments]] = {
    "normal": ("noise", noise._normal, lambda b: (DRAWS, 1, L, D, b)),
    "words": ("noise_bits", noise._words, lambda b: (DRAWS, 1, 0, L, b)),
    "diffusion": (
        "forward_diffusion",
        forward_diffusion._diffuse,
        lambda b: (X, None, ONES, ONES, MASK, DRAWS, 1, b),
    ),
    "diffusion everywhere": (
        "forward_diffusion",
        forward_diffusion._diffuse,
        lambda b: (X, None, ONES, ONES, None, DRAWS, 1, b),
    ),
    "diffusion of tokens": (
        "forward_diffusion",
        forward_diffusion._diffuse,
        lambda b: (TABLE, IDS, ONES, ONES, MASK, DRAWS, 1, b),
    ),
    "gradient of x0": (
        "forward_diffusion_backward",
        forward_diffusion._to_x0,
        lambda b: (X, ONES, MASK, b),
    ),
    "gradient of x0 everywhere": (
        "forward_diffusion_backward",
        forward_diffusion._to_x0,
        lambda b: (X, ONES, None, b),
    ),
    "gradient of the table": (
        "forward_diffusion_backward",
        forward_diffusion._to_table,
        lambda b: (X, IDS, ONES, MASK, V, b),
    ),
    **{
        f"distillation, {count} gradients, kl {kl}": (
            "distillation_loss",
            distillation._forward,
            lambda b, count=count, kl=kl: (
                X,
                Y,
                Z,
                MASK,
                ONES,
                1.0,
                kl,
                0.5,
                0.1,
                count,
                b,
            ),
        )
        for count, kl in ((0, False), (1, True), (3, False))
    },
    **{
        f"distillation's {count} gradients": (
            "distillation_loss_gradients",
            distillation._gradients,
            lambda b, count=count: (X, Y, Z, MASK, ONES, ONES, 0.5, count, b),
        )
        for count in (1, 3)
    },
    "linear cross-entropy": (
        "linear_cross_entropy",
        cross_entropy._forward,
        lambda b: (H, TABLE, None, TARGETS, SELECTED, False, b),
    ),
    **{
        f"gradients of the linear cross-entropy, {'some' if some is not None else 'all'}": (
            "linear_cross_entropy_backward",
            cross_entropy._backward,
            lambda b, some=some: linear_backward(b, (True, True, False), some),
        )
        for some in (None, SELECTED)
    },
    "add + norm": (
        "add_layer_norm",
        blocks._add_layer_norm,
        lambda b: (X, Y, VECTOR, VECTOR, 1e-5, True, b),
    ),
    "input + norm": (
        "input_layer_norm",
        blocks._input_layer_norm,
        lambda b: (X, TABLE, permuted(X[:, 0]), VECTOR, VECTOR, 1e-5, b),
    ),
    "gelu": (
        "bias_gelu",
        blocks._bias_gelu,
        lambda b: (X, VECTOR, b),
    ),
    "tanh": (
        "bias_tanh",
        blocks._bias_tanh,
        lambda b: (X, VECTOR, b),
    ),
    "margins": (
        "nearest_token_with_margin",
        nearest_token._ids_and_margin,
        lambda b: (H, TABLE, 0, b),
    ),
}


def names(op: str) -> list[str]:
    return [backend.name for backend in dispatch.backends(op) if backend.name != "cuda"]


@pytest.mark.parametrize(
    ("name", "backend"), [(name, b) for name, (op, *_) in CASES.items() for b in names(op)]
)
def test_real_strides_are_the_promised_ones(name: str, backend: str, device: torch.device):
    op, make = CASES[name][1].custom_op, CASES[name][2]
    if backend == "cpp" and not native.is_available():
        pytest.skip(f"native: {native.why_missing()}")
    place = torch.device("cpu") if backend == "cpp" else device
    if backend == "triton" and support.usable(torch.zeros(1, device=place)):
        pytest.skip(str(support.usable(torch.zeros(1, device=place))))
    # Moved one by one: strides stay.
    arguments = tree_map_only(Tensor, lambda t: t.to(place), make(backend))
    with torch.no_grad():
        real = op(*arguments)
    with FakeTensorMode() as mode, torch.no_grad():
        promised = op(*tree_map_only(Tensor, mode.from_tensor, arguments))
    real, promised = ((r,) if isinstance(r, Tensor) else r for r in (real, promised))
    for got, fake in zip(real, promised, strict=True):
        assert (got.shape, got.dtype, got.device) == (fake.shape, fake.dtype, fake.device)
        assert got.stride() == fake.stride()
