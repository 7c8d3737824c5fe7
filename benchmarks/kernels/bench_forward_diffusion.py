"""The forward process on target positions, from embeddings and from token ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.harness import checks
from benchmarks.harness.race import Race, ours
from benchmarks.kernels import floors, peers, shapes
from dlmone_fast.kernels import reference
from dlmone_fast.kernels.forward_diffusion import forward_diffusion, forward_diffusion_of_tokens
from dlmone_fast.kernels.noise import Stream, draws_of

_SEED, _STREAM, _STEP = 1, Stream.TEACHER_NOISE, 7
_ROWS_CHECKED = 4


@pytest.mark.shapes(shapes.FORWARD_DIFFUSION)
def test_forward_diffusion(race: Race, shape: shapes.Shape, device: torch.device) -> None:
    """x_t [B, 128, 128] of x_0; the second half of each sequence is the target."""
    x0 = torch.randn(shape.size, device=device).to(shape.dtype)
    alpha, sigma, mask, samples = _inputs(shape, device)

    def run(backend: str) -> Tensor:
        draws = (_SEED, _STREAM, samples, _STEP)
        return forward_diffusion(x0, alpha, sigma, mask, *draws, kernel_backend=backend)

    race(
        "forward diffusion",
        shape,
        {
            **ours("forward_diffusion", run),
            **peers.eager_and_compiled(peers.forward_diffusion, x0, alpha, sigma, mask),
        },
        checks.close_to(_exact(x0, alpha, sigma, mask, samples)),
        floors.forward_diffusion(shape),
        check_peer=checks.diffused(x0, alpha, sigma, mask),
    )


@pytest.mark.shapes(shapes.FORWARD_DIFFUSION)
def test_forward_diffusion_of_tokens(race: Race, shape: shapes.Shape, device: torch.device) -> None:
    """x_t [B, 128, 128] of token ids: x_0 is never in memory."""
    table = torch.randn(shapes.VOCABULARY, shape.width, device=device).to(shape.dtype)
    ids = torch.randint(shapes.VOCABULARY, shape.size[:2], device=device)
    alpha, sigma, mask, samples = _inputs(shape, device)

    def run(backend: str) -> Tensor:
        draws = (_SEED, _STREAM, samples, _STEP)
        return forward_diffusion_of_tokens(
            ids, table, alpha, sigma, mask, *draws, kernel_backend=backend
        )

    part = table[ids[:_ROWS_CHECKED]]
    function = peers.forward_diffusion_of_tokens
    race(
        "forward diffusion of tokens",
        shape,
        {
            **ours("forward_diffusion", run),
            **peers.eager_and_compiled(function, ids, table, alpha, sigma, mask),
        },
        checks.close_to(_exact(part, alpha, sigma, mask, samples)),
        floors.forward_diffusion_of_tokens(shape),
        check_peer=checks.diffused(table[ids], alpha, sigma, mask),
    )


def _inputs(shape: shapes.Shape, device: torch.device) -> tuple[Tensor, ...]:
    """Factors [B], mask [B, L] and sample indices [B]."""
    alpha_bar = torch.linspace(0.1, 0.9, shape.batch, device=device)
    mask = torch.arange(shape.length, device=device) >= shape.length // 2
    samples = torch.arange(shape.batch, device=device)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), mask.expand(shape.size[:2]).clone(), samples


def _exact(x0: Tensor, alpha: Tensor, sigma: Tensor, mask: Tensor, samples: Tensor) -> Tensor:
    """x_t of the first rows in fp64."""
    first = slice(_ROWS_CHECKED)
    draws = draws_of(_SEED, samples[first], _STEP, x0.device)
    noise = reference.normal(draws, _STREAM, x0.shape[1], x0.shape[2])
    scales = (alpha[first].double(), sigma[first].double())
    return reference.forward_diffusion(x0[first].double(), *scales, mask[first], noise)
