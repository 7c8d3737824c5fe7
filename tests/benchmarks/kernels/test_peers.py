"""Peers compute the same thing as the kernels that they are timed against."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.harness import checks
from benchmarks.kernels import peers
from dlmone_fast.kernels import reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("words", [1, 5, 50])
def test_rounding_peers_find_the_nearest_rows(words: int):
    x, table = random(9, 7), random(words, 7, seed=1)
    exact = reference.nearest_token(x, table)
    norms = table.square().sum(1)
    assert torch.equal(peers.all_differences(x, table), exact)
    assert torch.equal(peers.expanded_square(x, table), exact)
    assert torch.equal(peers.matmul_argmin(x, table, norms), exact)
    assert torch.equal(peers.expression_argmin(x, table, norms), exact)
    assert torch.equal(checks.nearest_ids(x, table), exact)


def test_every_rounding_peer_is_offered_and_right():
    x, table = random(9, 7), random(50, 7, seed=1)
    found = peers.rounding(x, table)
    assert {"matmul + argmin", "DiffuSeq get_knn", "DiffuSeq get_efficient_knn"} <= set(found)
    check = checks.same_ids(reference.nearest_token(x, table))
    # Compiling takes seconds and is torch's own matter.
    uncompiled = {name: call for name, call in found.items() if "compiled" not in name}
    assert {name: check(call()) for name, call in uncompiled.items()} == dict.fromkeys(uncompiled)


def test_all_differences_are_not_made_for_many_tokens():
    assert "DiffuSeq get_knn" not in peers.rounding(random(129, 3), random(5, 3))


def test_forward_diffusion_noises_targets_only():
    x0, mask = random(8, 64, 32), torch.arange(64).expand(8, 64) >= 32
    alpha, sigma = torch.linspace(0.1, 0.9, 8), torch.linspace(0.9, 0.1, 8)
    torch.manual_seed(0)
    x_t = peers.forward_diffusion(x0, alpha, sigma, mask)
    assert checks.diffused(x0, alpha, sigma, mask)(x_t) is None
    noise = torch.where(mask[..., None], (x_t - alpha[:, None, None] * x0), 0)
    noise = noise / sigma[:, None, None]
    assert checks.close_to(reference.forward_diffusion(x0, alpha, sigma, mask, noise))(x_t) is None


def test_distillation_loss_is_the_reference():
    inputs = [random(3, 5, 4, seed=seed) for seed in range(3)]
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    loss = peers.distillation_loss(*inputs, mask, 1.2, 0.05)
    exact = reference.distillation_loss(*inputs, mask, "sid", 1.2, 0.05)[0]
    assert checks.close_to(exact)(loss) is None


def test_linear_cross_entropy_is_the_reference():
    h, table, ids = random(6, 4), random(11, 4, seed=1), torch.tensor([0, 3, 10, 2, 2, 9])
    exact = reference.linear_cross_entropy(h, table, ids)
    assert checks.close_to(exact)(peers.linear_cross_entropy(h, table, ids)) is None


def test_blocks_are_the_references():
    x, residual, time = random(2, 3, 16), random(2, 3, 16, seed=1), random(2, 16, seed=2)
    position, weight, bias = random(3, 16, seed=3), random(16, seed=4), random(16, seed=5)
    norm = (weight, bias, 1e-6)
    for actual, exact in (
        (
            peers.add_layer_norm(x, residual, *norm),
            reference.add_layer_norm(x, residual, *norm)[0],
        ),
        (
            peers.input_layer_norm(x, position, time, *norm),
            reference.input_layer_norm(x, position, time, *norm),
        ),
        (peers.bias_gelu(x, bias), reference.bias_gelu(x, bias)),
        (peers.bias_tanh(x, bias), reference.bias_tanh(x, bias)),
    ):
        assert checks.close_to(exact)(actual) is None
