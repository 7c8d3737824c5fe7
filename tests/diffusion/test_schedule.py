"""Noise schedules against closed forms, and the forward process against its statistics."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dlmone_fast.config import DiffusionConfig
from dlmone_fast.config.schema import SCHEDULES
from dlmone_fast.diffusion import Schedule
from dlmone_fast.diffusion.schedule import keep_source, named_betas
from dlmone_fast.errors import ConfigError, UsageError

# DiffuSeq's sqrt schedule at T = 2000: t, beta, alpha_bar, alpha, sigma, sigma / alpha.
PUBLISHED = [
    (0, 0.014641, 0.985359, 0.99265, 0.12100, 0.1219),
    (10, 0.003682, 0.934512, 0.96670, 0.25591, 0.2647),
    (100, 0.001435, 0.782884, 0.88481, 0.46596, 0.5266),
    (500, 0.001000, 0.504445, 0.71024, 0.70396, 0.9912),
    (1000, 0.001207, 0.295423, 0.54353, 0.83939, 1.5443),
    (1490, 0.002117, 0.137898, 0.37135, 0.92849, 2.5004),
    (1976, 0.042138, 0.005774, 0.07599, 0.99711, 13.122),
]


@pytest.fixture(scope="module")
def sqrt_schedule() -> Schedule:
    return Schedule(DiffusionConfig())


def test_the_sqrt_schedule_telescopes(sqrt_schedule: Schedule) -> None:
    steps = sqrt_schedule.num_timesteps
    expected = [(1 - math.sqrt((i + 1) / steps + 1e-4)) / 0.99 for i in range(steps - 1)]
    found = sqrt_schedule.alphas_cumprod[:-1]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=0, atol=1e-12)
    assert float(sqrt_schedule.betas[-1]) == 0.999


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"t{row[0]}")
def test_the_sqrt_schedule_has_the_published_values(
    sqrt_schedule: Schedule, row: tuple[float, ...]
) -> None:
    t = int(row[0])
    alpha_bar = float(sqrt_schedule.alphas_cumprod[t])
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    found = (float(sqrt_schedule.betas[t]), alpha_bar, alpha, sigma, sigma / alpha)
    for value, expected in zip(found, row[1:], strict=True):
        digits = len(f"{expected:g}".split(".")[1])
        assert value == pytest.approx(expected, abs=1.01 * 10**-digits)


def restated(name: str, steps: int) -> npt.NDArray[np.float64]:
    """alpha_bar [steps] straight from each schedule's definition."""
    scale, i = 1000 / steps, np.arange(steps)
    line = i / (steps - 1)
    if name in ("linear", "trunc_lin"):
        offset = 0.0 if name == "linear" else 0.01
        betas = offset + scale * (1e-4 + (0.02 - 1e-4) * line)
    elif name == "pw_lin":
        head = scale * 1e-4 + 0.01 * (1 - np.arange(10) / 9)
        tail = scale * (1e-4 + (0.02 - 1e-4) * np.arange(steps - 10) / (steps - 11))
        betas = np.concatenate([head, tail])
    else:
        return _restated_from_alpha_bar(name, (i + 1) / steps)
    return np.asarray(np.cumprod(1 - betas))


def _restated_from_alpha_bar(name: str, s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if name == "sqrt":
        f = (1 - np.sqrt(s + 1e-4)) / 0.99
    elif name == "cosine":
        start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        f = np.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2 / start
    else:
        # Starts at f(0) < 1, and so lags one step behind.
        f = np.cos((np.concatenate([[0], s[:-1]]) + 0.1) / 1.1 * math.pi / 2) ** 2
    if name != "trunc_cos":
        f[-1] = f[-2] * 0.001
    return np.asarray(f)


@pytest.mark.parametrize("steps", [50, 2000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_its_definition(name: str, steps: int) -> None:
    found = Schedule(DiffusionConfig(name, steps)).alphas_cumprod.numpy()
    np.testing.assert_allclose(found, restated(name, steps), rtol=1e-9, atol=1e-15)


def fewest_steps() -> int:
    for steps in range(1, 100):
        try:
            DiffusionConfig(num_timesteps=steps)
        except ConfigError:
            continue
        return steps
    raise AssertionError("no number of steps below 100 is allowed")


@pytest.mark.parametrize("steps", [fewest_steps(), 200, 2000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_falls_from_one_to_zero(name: str, steps: int) -> None:
    schedule = Schedule(DiffusionConfig(name, steps))
    assert bool(((schedule.betas > 0) & (schedule.betas < 1)).all())
    alpha_bar = schedule.alphas_cumprod
    assert bool(((alpha_bar > 0) & (alpha_bar < 1)).all())
    assert bool((alpha_bar.diff() < 0).all())
    assert torch.equal(schedule.alphas_cumprod_prev[1:], alpha_bar[:-1])
    assert all(torch.isfinite(table).all() for table in schedule._tables.values())


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="schedule must be one of sqrt, linear"):
        DiffusionConfig(schedule="sqr")
    with pytest.raises(UsageError, match="'sqr'"):
        named_betas("sqr", 100)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_posterior_is_the_product_of_two_gaussians(name: str) -> None:
    schedule = Schedule(DiffusionConfig(name))
    alpha, beta = (1 - schedule.betas)[1:], schedule.betas[1:]
    before = schedule.alphas_cumprod_prev[1:]
    # N(x_t; sqrt(alpha) x, beta) and N(x; sqrt(before) x_0, 1 - before): precisions add.
    variance = 1 / (alpha / beta + 1 / (1 - before))
    torch.testing.assert_close(schedule.posterior_variance[1:], variance)
    torch.testing.assert_close(
        schedule.posterior_mean_coef1[1:], variance * before.sqrt() / (1 - before)
    )
    torch.testing.assert_close(schedule.posterior_mean_coef2[1:], variance * alpha.sqrt() / beta)
    first = [
        float(table[0])
        for table in (
            schedule.posterior_mean_coef1,
            schedule.posterior_mean_coef2,
            schedule.posterior_variance,
        )
    ]
    assert first == pytest.approx([1, 0, 0], abs=1e-12)


@pytest.mark.parametrize("t", [0, 700, 1999])
def test_q_sample_has_the_mean_and_spread_of_its_level(sqrt_schedule: Schedule, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    noise = torch.randn(4, 200, 100, generator=generator)
    x_t = sqrt_schedule.q_sample(torch.full_like(noise, 3.0), torch.full((4,), t), noise)
    alpha_bar = float(sqrt_schedule.alphas_cumprod[t])
    sigma = math.sqrt(1 - alpha_bar)
    count = noise.numel()
    assert float(x_t.mean()) == pytest.approx(
        3 * math.sqrt(alpha_bar), abs=4 * sigma / math.sqrt(count)
    )
    assert float(x_t.std()) == pytest.approx(sigma, rel=4 / math.sqrt(2 * count))


def test_q_sample_noises_each_row_at_its_level_and_leaves_the_source(
    sqrt_schedule: Schedule,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 6, 4, generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    x_t = sqrt_schedule.q_sample(x0, torch.tensor([3, 1500]), noise, mask)
    assert torch.equal(x_t[mask == 0], x0[mask == 0])
    for row, t in enumerate((3, 1500)):
        alpha_bar = float(sqrt_schedule.alphas_cumprod[t])
        expected = math.sqrt(alpha_bar) * x0[row] + math.sqrt(1 - alpha_bar) * noise[row]
        kept = mask[row] == 1
        torch.testing.assert_close(x_t[row][kept], expected[kept])


def test_keep_source_takes_source_positions_only() -> None:
    x, source = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    kept = keep_source(x, source, torch.tensor([[0, 1, 1]]))
    assert kept[0, :, 0].tolist() == [1, 0, 0]


def test_the_network_is_told_rescaled_fractional_times() -> None:
    t = torch.tensor([0, 1, 1490, 1999])
    rescaled = Schedule(DiffusionConfig()).network_time(t)
    assert rescaled.tolist() == [0, 0.5, 745.0, 999.5]
    plain = Schedule(DiffusionConfig(rescale_timesteps=False)).network_time(t)
    assert plain.tolist() == [0, 1, 1490, 1999]
