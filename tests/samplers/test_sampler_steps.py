"""Sampler steps on Gaussian data, where the ideal network and the exact answer are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlmone_fast.config import DiffusionConfig
from dlmone_fast.diffusion import Schedule
from dlmone_fast.samplers import steps
from dlmone_fast.samplers.loop import SamplerOptions, sample

# A shorter chain than DiffuSeq's 2000 steps is as good an integrator here.
SCHEDULE = Schedule(DiffusionConfig(num_timesteps=640))
MEAN = torch.tensor([0.7, -1.1, 0.0, 0.4])
STD = 0.5
SHAPE = (100, 32, 4)
MASK = torch.ones(SHAPE[:2], dtype=torch.int64)

Step = Callable[[Tensor, int, int, "list[tuple[Tensor, int]]"], Tensor]


def alpha_sigma(t: int) -> tuple[float, float]:
    alpha_bar = float(SCHEDULE.alphas_cumprod[t])
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def ideal(x_t: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t] for x_0 ~ N(MEAN, STD²) in every channel."""
    alpha, sigma = alpha_sigma(int(t.flatten()[0]))
    gain = STD**2 * alpha / (alpha**2 * STD**2 + sigma**2)
    mean = MEAN.to(x_t.dtype)
    return mean + gain * (x_t - alpha * mean)


def exact_flow(x: Tensor, t: int, t_next: int) -> Tensor:
    """The probability-flow ODE: it keeps the distance to the mean in standard deviations."""
    mean = MEAN.to(x.dtype)
    scaled = [alpha_sigma(level) for level in (t, t_next)]
    before, after = (math.sqrt((a * STD) ** 2 + s**2) for a, s in scaled)
    return scaled[1][0] * mean + (x - scaled[0][0] * mean) * after / before


def noise(k: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(k))


def samples(method: str, calls: int, eta: float = 0.0) -> Tensor:
    options = SamplerOptions(method, calls, eta, clamp=False)
    zeros = torch.zeros(SHAPE)
    return sample(ideal, SCHEDULE, options, zeros, MASK, noise, lambda x: x)


def final_spread(last: int) -> float:
    """Spread of an exact chain's result: the last call, at `last`, returns a posterior mean."""
    alpha, sigma = alpha_sigma(last)
    signal = (alpha * STD) ** 2
    return STD * math.sqrt(signal / (signal + sigma**2))


def assert_data_like(x: Tensor, last: int, tolerance: float) -> None:
    count = x.numel()
    # Four standard errors, beside the discretisation error.
    assert (x.mean((0, 1)) - MEAN).abs().max() < 4 * STD / math.sqrt(count / 4) + 0.005
    error = float((x - MEAN).square().mean().sqrt()) / final_spread(last) - 1
    assert abs(error) < 4 / math.sqrt(2 * count) + tolerance


def remembers_its_start(x: Tensor) -> bool:
    pair = torch.stack([(x - MEAN).flatten(), noise(0).flatten()])
    return float(torch.corrcoef(pair)[0, 1]) > 0.99


def test_ancestral_samples_are_data() -> None:
    x = samples("ancestral", SCHEDULE.num_timesteps)
    assert_data_like(x, last=0, tolerance=0.02)
    assert not remembers_its_start(x)


def test_stochastic_ddim_has_the_statistics_of_ancestral_sampling() -> None:
    x = samples("ddim", SCHEDULE.num_timesteps, eta=1.0)
    assert_data_like(x, last=0, tolerance=0.02)
    assert not remembers_its_start(x)


@pytest.mark.parametrize("method", ["ddim", "dpm-solver++"])
def test_deterministic_samplers_converge_to_the_data(method: str) -> None:
    errors = []
    for calls in (10, 40, 160):
        x = samples(method, calls)
        assert remembers_its_start(x)
        last = SCHEDULE.num_timesteps // calls - 1
        # Free of sampling error: the chain scales its start by one factor.
        spread = float((x - MEAN).std() / noise(0).std())
        errors.append(abs(spread / final_spread(last) - 1))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def ddim_step(x: Tensor, t: int, t_next: int, before: list[tuple[Tensor, int]]) -> Tensor:
    return steps.ddim(SCHEDULE, ideal(x, torch.tensor([t])), x, t, t_next)


def dpm_step(x: Tensor, t: int, t_next: int, before: list[tuple[Tensor, int]]) -> Tensor:
    x0 = ideal(x, torch.tensor([t]))
    earlier, t_before = before[-1] if before else (None, None)
    before[:] = [(x0, t)]
    return steps.dpm_solver(SCHEDULE, x0, x, t, t_next, earlier, t_before)


def integration_error(step: Step, count: int) -> float:
    start = torch.linspace(-2, 2, 24, dtype=torch.float64).view(1, 6, 4)
    grid = [560 - 480 * i // count for i in range(count + 1)]
    x, before = start, list[tuple[Tensor, int]]()
    for t, t_next in itertools.pairwise(grid):
        x = step(x, t, t_next, before)
    return float((x - exact_flow(start, grid[0], grid[-1])).abs().max())


def test_ddim_is_of_first_order_and_dpm_solver_of_second() -> None:
    for step, order in ((ddim_step, 1), (dpm_step, 2)):
        errors = [integration_error(step, count) for count in (30, 60, 120, 240)]
        for coarse, fine in itertools.pairwise(errors):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("count", [10, 20, 40])
def test_dpm_solver_beats_ddim_at_equal_calls(count: int) -> None:
    assert integration_error(dpm_step, count) < 0.5 * integration_error(ddim_step, count)


def test_the_first_dpm_solver_step_is_a_ddim_step() -> None:
    x = noise(1)[:2].double()
    first = dpm_step(x, 480, 320, [])
    torch.testing.assert_close(first, ddim_step(x, 480, 320, []))


def test_ancestral_noise_has_the_fixed_large_variance_and_none_at_the_end() -> None:
    x0, x_t = noise(1)[:3], noise(2)[:3]
    t = torch.tensor([480, 1, 0])
    quiet = steps.ancestral(SCHEDULE, x0, x_t, t, torch.zeros_like(x0))
    loud = steps.ancestral(SCHEDULE, x0, x_t, t, torch.ones_like(x0))
    expected = [float(SCHEDULE.betas[480]) ** 0.5, float(SCHEDULE.betas[1]) ** 0.5, 0]
    assert (loud - quiet).mean((1, 2)).tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(quiet[2], x0[2])


@pytest.mark.parametrize("t", [480, 30])
def test_stochastic_ddim_has_the_posterior_variance(t: int) -> None:
    x0, x_t = noise(1)[:3], noise(2)[:3]
    zeros, ones = torch.zeros_like(x0), torch.ones_like(x0)
    quiet = steps.ddim(SCHEDULE, x0, x_t, t, t - 1, 1.0, zeros)
    loud = steps.ddim(SCHEDULE, x0, x_t, t, t - 1, 1.0, ones)
    spread = float((loud - quiet).mean())
    assert spread**2 == pytest.approx(float(SCHEDULE.posterior_variance[t]), rel=1e-3)
    mean = steps.ancestral(SCHEDULE, x0, x_t, torch.full((3,), t), zeros)
    torch.testing.assert_close(quiet, mean, rtol=1e-3, atol=1e-4)


def test_the_published_step_moves_one_level_whatever_the_gap() -> None:
    x0, x_t = noise(1)[:2], noise(2)[:2]
    found = steps.published_ddim(SCHEDULE, x0, x_t, torch.tensor([480, 480]))
    torch.testing.assert_close(found, steps.ddim(SCHEDULE, x0, x_t, 480, 479), rtol=1e-4, atol=1e-4)
    # So with the ideal network a strided chain loses the data's spread; the full one keeps it.
    errors = [
        abs(float((samples("published-ddim", calls) - MEAN).std()) / final_spread(0) - 1)
        for calls in (640, 64)
    ]
    assert errors[0] < 0.02
    assert errors[1] > 0.2


def test_renoising_draws_from_the_forward_process() -> None:
    x0, draw = noise(1)[:2], noise(2)[:2]
    expected = SCHEDULE.q_sample(x0, torch.tensor([130, 130]), draw)
    torch.testing.assert_close(steps.renoise(SCHEDULE, x0, 130, draw), expected)
    assert steps.renoise(SCHEDULE, x0, None, draw) is x0
