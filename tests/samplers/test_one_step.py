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
from dlmone_fast.kernels.nearest_token import Vocabulary
from dlmone_fast.runtime.pipeline import Pipeline
from dlmone_fast.samplers.one_step import generate_embeddings, generate_mixture, renoising_times

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


def test_a_mixture_gives_each_row_what_its_number_of_calls_gives() -> None:
    seen: list[Tensor] = []
    generate_embeddings(
        network, SCHEDULE, 1490, 3, SOURCE, MASK, noise, callback=lambda *call: seen.append(call[2])
    )
    times: list[list[int]] = []

    def noted(x: Tensor, t: Tensor) -> Tensor:
        times.append(t.tolist())
        return network(x, t)

    for calls in ([1, 1], [2, 2], [3, 3], [3, 1], [1, 2]):
        times.clear()
        x = generate_mixture(
            noted, network, SCHEDULE, 1490, 3, torch.tensor(calls), SOURCE, MASK, noise
        )
        expected = torch.stack([seen[k - 1][row] for row, k in enumerate(calls)])
        torch.testing.assert_close(x, expected)
        # One batch makes the last call of every row.
        assert times == [[renoising_times(1490, 3)[k - 1] for k in calls]]


def test_generation_with_as_many_steps_calls_the_timesteps_that_were_trained() -> None:
    for steps in (1, 2, 4, 7):
        vocabulary = Vocabulary(torch.randn(5, 4))
        pipeline = Pipeline(SCHEDULE, vocabulary, 1490, steps, scale_latent=True)
        drafted: list[int] = []

        def network_at(x: Tensor, t: Tensor, drafted: list[int] = drafted) -> Tensor:
            drafted.append(int(t[0]))
            return network(x, t)

        calls = torch.full((2,), steps)
        generate_mixture(network_at, network_at, SCHEDULE, 1490, steps, calls, SOURCE, MASK, noise)
        assert drafted == pipeline.times


def test_gradients_of_a_mixture_pass_through_the_last_call_alone() -> None:
    source, calls = SOURCE.double(), torch.tensor([3, 1])

    def loss(weight: Tensor, of_drafts: Tensor) -> Tensor:
        x = generate_mixture(
            lambda x, t: torch.tanh(weight * network(x, t)),
            lambda x, t: torch.tanh(of_drafts * network(x, t)),
            SCHEDULE, 1490, 3, calls, source, MASK, lambda k: noise(k).double(),
        )  # fmt: skip
        return x.square().sum()

    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(weight, weight), weight)
    step, fixed = 1e-6, weight.detach()
    ahead, behind = loss(fixed + step, fixed), loss(fixed - step, fixed)
    torch.testing.assert_close(gradient, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
    whole = loss(fixed + step, fixed + step) - loss(fixed - step, fixed - step)
    assert abs(float(whole / (2 * step) - gradient)) > 1e-2
