"""The generator θ: when it is called, with what, and what it returns."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dlmone_fast.config import DiffusionConfig
from dlmone_fast.diffusion import Schedule
from dlmone_fast.errors import UsageError
from dlmone_fast.samplers.one_step import generate_embeddings, renoising_times

SCHEDULE = Schedule(DiffusionConfig())
SOURCE = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(9))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
TARGET = MASK == 1


def noise(k: int) -> Tensor:
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(k))


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x + 0.1 * x.sum(1, keepdim=True)) + t.view(-1, 1, 1) / 2000


def alpha_sigma(t: int) -> tuple[float, float]:
    alpha_bar = float(SCHEDULE.alphas_cumprod[t])
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def merged(x: Tensor) -> Tensor:
    return torch.where(TARGET.unsqueeze(-1), x, SOURCE)


@pytest.mark.parametrize(
    ("steps", "times"),
    [(1, [1490]), (2, [1490, 745]), (3, [1490, 993, 496]), (4, [1490, 1117, 745, 372])],
)
def test_the_calls_are_spread_below_t_init(steps: int, times: list[int]) -> None:
    assert renoising_times(1490, steps) == times


@pytest.mark.parametrize("steps", [0, -1, 1491])
def test_impossible_numbers_of_calls_are_refused(steps: int) -> None:
    with pytest.raises(UsageError, match=rf"between 1 and t_init \(1490\), got {steps}"):
        renoising_times(1490, steps)


@pytest.mark.parametrize("scale_latent", [True, False])
def test_one_step_is_one_call_at_t_init(scale_latent: bool) -> None:
    x = generate_embeddings(network, SCHEDULE, 1490, 1, SOURCE, MASK, noise, scale_latent)
    sigma = 0.92849 if scale_latent else 1.0
    expected = network(merged(sigma * noise(0)), torch.tensor([1490, 1490]))
    torch.testing.assert_close(x[TARGET], expected[TARGET], rtol=1e-4, atol=1e-4)
    assert torch.equal(x[~TARGET], SOURCE[~TARGET])


def test_more_steps_renoise_the_output_without_rounding() -> None:
    seen: list[tuple[int, int, Tensor]] = []
    x = generate_embeddings(
        network, SCHEDULE, 1490, 4, SOURCE, MASK, noise, callback=lambda *call: seen.append(call)
    )
    assert [(i, t) for i, t, _ in seen] == [(0, 1490), (1, 1117), (2, 745), (3, 372)]
    for (_, _, before), (i, t, after) in itertools.pairwise(seen):
        alpha, sigma = alpha_sigma(t)
        x_t = merged(alpha * before + sigma * noise(i))
        expected = merged(network(x_t, torch.full((2,), t)))
        torch.testing.assert_close(after, expected)
    assert torch.equal(x, seen[-1][2])


def test_gradients_reach_the_generator() -> None:
    weight = torch.ones((), requires_grad=True)
    x = generate_embeddings(
        lambda x, t: weight * network(x, t), SCHEDULE, 1490, 1, SOURCE, MASK, noise
    )
    x.sum().backward()
    assert weight.grad is not None
    expected = network(merged(0.92849 * noise(0)), torch.tensor([1490, 1490]))[TARGET].sum()
    assert float(weight.grad) == pytest.approx(float(expected), rel=1e-3)
