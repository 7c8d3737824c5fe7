"""torch.set_default_device and `with torch.device(...)` change nothing: results follow inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dlmone_fast.kernels import blocks, dispatch, native, noise
from dlmone_fast.kernels.distillation_loss import distillation_loss
from dlmone_fast.kernels.forward_diffusion import (
    diffuse_of_draws,
    forward_diffusion,
    forward_diffusion_of_tokens,
)
from dlmone_fast.kernels.linear_cross_entropy import linear_cross_entropy
from dlmone_fast.kernels.linear_cross_entropy import torch as tiles
from dlmone_fast.kernels.nearest_token import Vocabulary, nearest_token, nearest_token_with_margin


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


IDS = torch.tensor([[1, 0, 3], [2, 2, 4]])
MASK = torch.tensor([[1, 0, 1], [1, 1, 0]])
TABLE = random(5, 8)
X = random(2, 3, 8)
ONES = torch.ones(2)
VECTOR = random(8)
DRAWS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
DRAW = (7, 1, [3, 4], 0)


def differentiated(run: Callable[..., Any], *leaves: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    result = run(*leaves)
    return result.detach(), *torch.autograd.grad(result.sum() * 2, leaves)


def inference(run: Callable[..., Any]) -> Any:
    with torch.no_grad():
        return run()


OPERATIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "normal": ("noise", lambda **b: noise.normal(*DRAW, 3, 5, **b)),
    "normal of a device": ("noise", lambda **b: noise.normal(*DRAW, 3, 5, "cpu", **b)),
    "normal of numbers": ("noise", lambda **b: noise.normal(7, 1, 3, 0, 3, 5, **b)),
    "words": ("noise_bits", lambda **b: noise.words_of_draws(DRAWS, 1, 3, **b)),
    "diffusion": (
        "forward_diffusion",
        lambda **b: differentiated(lambda x: forward_diffusion(x, ONES, ONES, MASK, *DRAW, **b), X),
    ),
    "diffusion of tokens": (
        "forward_diffusion",
        lambda **b: differentiated(
            lambda e: forward_diffusion_of_tokens(IDS, e, ONES, ONES, None, *DRAW, **b), TABLE
        ),
    ),
    "diffusion of draws": (
        "forward_diffusion",
        lambda **b: diffuse_of_draws(X, None, ONES, ONES, MASK, DRAWS, 1, **b),
    ),
    "distillation": (
        "distillation_loss",
        lambda **b: differentiated(
            lambda *t: distillation_loss(*t, MASK, weight_floor=0.1, **b)[0], X, X + 1, X - 1
        ),
    ),
    "nearest token": ("nearest_token", lambda **b: nearest_token(X, TABLE, **b)),
    "nearest token of a vocabulary": (
        "nearest_token",
        lambda **b: nearest_token(X, Vocabulary(TABLE), **b),
    ),
    "margins": (
        "nearest_token_with_margin",
        lambda **b: nearest_token_with_margin(X, Vocabulary(TABLE), **b),
    ),
    "one word": (
        "nearest_token_with_margin",
        lambda **b: nearest_token_with_margin(X, TABLE[:1], **b),
    ),
    "linear cross-entropy": (
        "linear_cross_entropy",
        lambda **b: differentiated(
            lambda h, e: linear_cross_entropy(h, e, IDS, mask=MASK, **b), X, TABLE
        ),
    ),
    "linear cross-entropy of all": (
        "linear_cross_entropy",
        lambda **b: differentiated(lambda h, e: linear_cross_entropy(h, e, IDS, **b), X, TABLE),
    ),
    "add + norm": (
        "add_layer_norm",
        lambda **b: inference(
            lambda: blocks.add_layer_norm(X, X, VECTOR, VECTOR, 1e-5, return_sum=True, **b)
        ),
    ),
    "input + norm": (
        "input_layer_norm",
        lambda **b: inference(
            lambda: blocks.input_layer_norm(X, TABLE, X[:, 0], VECTOR, VECTOR, 1e-5, **b)
        ),
    ),
    "gelu": ("bias_gelu", lambda **b: inference(lambda: blocks.bias_gelu(X, VECTOR, **b))),
    "tanh": ("bias_tanh", lambda **b: inference(lambda: blocks.bias_tanh(X, VECTOR, **b))),
}
CASES = [
    (name, backend.name)
    for name, (op, _) in OPERATIONS.items()
    for backend in dispatch.backends(op)
    if backend.name != "cuda"
]


def usable_or_skip(backend: str) -> None:
    if backend == "cpp" and not native.is_available():
        pytest.skip(f"native: {native.why_missing()}")
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton runs CPU tensors in its interpreter only")


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize(
    ("name", "backend", "plain_logits"),
    [*((*case, 0) for case in CASES), ("linear cross-entropy", "torch", tiles.PLAIN_LOGITS)],
)
def test_results_are_where_the_inputs_are(
    name: str, backend: str, plain_logits: int, monkeypatch: pytest.MonkeyPatch
):
    usable_or_skip(backend)
    monkeypatch.setattr(tiles, "PLAIN_LOGITS", plain_logits)
    run = OPERATIONS[name][1]
    expected = tensors(run(kernel_backend=backend))
    with torch.device("meta"):
        found = tensors(run(kernel_backend=backend))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: noise.random_bits(3, 1, 2, 0, 5),
        lambda: noise.random_bits(3, 1, [2, 4], 0, 5),
        lambda: noise.random_bits([3, 4], 1, 2, 0, 5),
        lambda: noise.uniform_integers(3, 1, 2, 0, 0, 100),
        lambda: noise.uniform_integers(3, 1, [2, 5], 0, 0, 100),
        lambda: noise.permutation(3, 1, 0, 10),
        lambda: noise.permutation(3, 1, 0, 0),
        lambda: noise.draws_of(3, [1, 2], 0, torch.device("cpu")),
    ],
)
def test_integers_are_drawn_on_the_cpu_unless_told(draw: Callable[[], Tensor]):
    expected = draw()
    with torch.device("meta"):
        assert torch.equal(draw(), expected)
