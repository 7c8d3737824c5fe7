"""Draws of t: their range, their probabilities, and that they depend on their place alone."""

from __future__ import annotations

import math

import pytest
import torch

from dlmone_fast.config import DiffusionConfig
from dlmone_fast.diffusion import (
    LogSnrTimesteps,
    LossAwareTimesteps,
    Schedule,
    TimestepSampler,
    UniformTimesteps,
)

T = 20
ROWS = torch.arange(20_000)


def warm(losses_of: torch.Tensor, repeats: int = 10) -> LossAwareTimesteps:
    """A loss-aware sampler that has seen every t `repeats` times."""
    sampler = LossAwareTimesteps(T)
    for _ in range(repeats):
        sampler.update(torch.arange(T), losses_of)
    return sampler


def log_snr_sampler(share: float, location: float = 3.0, scale: float = 0.85) -> LogSnrTimesteps:
    return LogSnrTimesteps(Schedule(DiffusionConfig()), location, scale, share)


def shares(t: torch.Tensor) -> torch.Tensor:
    return torch.bincount(t, minlength=T).double() / len(t)


def test_uniform_draws_cover_every_t_evenly() -> None:
    t, weight = UniformTimesteps(T).sample(1, 0, ROWS)
    assert t.dtype == torch.int64
    assert (shares(t) - 1 / T).abs().max() < 5 * (1 / T / len(ROWS)) ** 0.5
    assert torch.equal(weight, torch.ones(len(ROWS)))


def test_loss_aware_draws_are_uniform_until_every_t_has_ten_losses() -> None:
    sampler = warm(torch.linspace(1, 5, T), repeats=9)
    sampler.update(torch.arange(T - 1), torch.full((T - 1,), 100.0))
    assert torch.equal(sampler.probabilities(), torch.full((T,), 1 / T, dtype=torch.float64))
    t, weight = sampler.sample(1, 0, ROWS)
    assert (shares(t) - 1 / T).abs().max() < 5 * (1 / T / len(ROWS)) ** 0.5
    torch.testing.assert_close(weight, torch.ones(len(ROWS)))


def test_loss_aware_draws_follow_the_root_mean_square_loss() -> None:
    losses = torch.linspace(1, 5, T)
    sampler = warm(losses, repeats=5)
    for _ in range(5):
        sampler.update(torch.arange(T), 3 * losses)
    rms = ((losses**2 + (3 * losses) ** 2) / 2).sqrt().double()
    expected = 0.999 * rms / rms.sum() + 0.001 / T
    torch.testing.assert_close(sampler.probabilities(), expected)
    t, weight = sampler.sample(3, 0, ROWS)
    assert (shares(t) - expected).abs().max() < 5 * (0.1 / len(ROWS)) ** 0.5
    torch.testing.assert_close(weight, (1 / (T * expected[t])).float())


def test_importance_weights_keep_the_mean_loss() -> None:
    losses = torch.linspace(0.5, 8, T)
    sampler = warm(losses)
    p = sampler.probabilities()
    assert float(p.sum()) == pytest.approx(1)
    t, weight = sampler.sample(5, 0, ROWS)
    assert float(weight.mean()) == pytest.approx(1, abs=0.05)
    assert float((weight * losses[t]).mean()) == pytest.approx(float(losses.mean()), rel=0.01)


def test_a_timestep_without_loss_is_still_drawn() -> None:
    losses = torch.ones(T)
    losses[7] = 0
    p = warm(losses).probabilities()
    assert float(p[7]) == pytest.approx(0.001 / T)


def test_only_the_last_ten_losses_count() -> None:
    sampler = LossAwareTimesteps(T)
    losses = torch.ones(T)
    for count in range(1, 25):
        losses[4] = count
        sampler.update(torch.arange(T), losses)
        if count >= 10:
            rms = (sum(value**2 for value in range(count - 9, count + 1)) / 10) ** 0.5
            expected = 0.999 * rms / (rms + T - 1) + 0.001 / T
            assert float(sampler.probabilities()[4]) == pytest.approx(expected)


@pytest.mark.parametrize(
    "sampler", [UniformTimesteps(T), warm(torch.linspace(1, 5, T)), log_snr_sampler(0.2)]
)
def test_a_draw_depends_on_seed_step_and_sample_alone(sampler: TimestepSampler) -> None:
    rows = torch.arange(64)
    t, weight = sampler.sample(7, 3, rows)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled, shuffled_weight = sampler.sample(7, 3, rows[order])
    assert torch.equal(shuffled, t[order])
    assert torch.equal(shuffled_weight, weight[order])
    assert torch.equal(sampler.sample(7, 3, rows[40:41])[0], t[40:41])
    for other in (sampler.sample(8, 3, rows), sampler.sample(7, 4, rows)):
        assert not torch.equal(other[0], t)


def test_a_restored_sampler_continues_as_the_original() -> None:
    original = warm(torch.linspace(1, 5, T), repeats=12)
    restored = LossAwareTimesteps(T)
    restored.restore({name: value.clone() for name, value in original.state().items()})
    for sampler in (original, restored):
        sampler.update(torch.tensor([0, 0, 3]), torch.tensor([9.0, 8.0, 7.0]))
    assert torch.equal(original.probabilities(), restored.probabilities())
    assert torch.equal(original.sample(0, 1, ROWS)[0], restored.sample(0, 1, ROWS)[0])


def test_log_snr_draws_follow_the_gumbel_distribution() -> None:
    sampler = log_snr_sampler(0.0)
    t, weight = sampler.sample(1, 0, ROWS)
    assert t.dtype == torch.int64
    assert torch.equal(weight, torch.ones(len(ROWS)))
    noise = -torch.logit(sampler.schedule.alphas_cumprod)[t]
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        expected = 3.0 - 0.85 * math.log(-math.log(quantile))
        assert float((noise <= expected).double().mean()) == pytest.approx(quantile, abs=0.015)


def test_a_share_of_the_log_snr_draws_is_uniform() -> None:
    # A Gumbel this far out puts every other draw on the noisiest timestep.
    t, _ = log_snr_sampler(0.2, location=90.0).sample(2, 5, ROWS)
    assert float((t < 1999).double().mean()) == pytest.approx(0.2, abs=0.01)
    quarters = torch.bincount(t[t < 1999] // 500, minlength=4).double()
    assert (quarters / quarters.sum() - 0.25).abs().max() < 0.03
    uniform, _ = log_snr_sampler(1.0).sample(2, 5, ROWS)
    assert torch.equal(uniform, UniformTimesteps(2000).sample(2, 5, ROWS)[0])
    assert torch.equal(t[t < 1999], uniform[t < 1999])


def test_a_share_of_the_draws_is_pure_noise() -> None:
    sampler = log_snr_sampler(0.1)
    pure = LogSnrTimesteps(sampler.schedule, 3.0, 0.85, 0.1, pure_share=0.5)
    (before, _), (after, weight) = (s.sample(3, 0, torch.arange(4000)) for s in (sampler, pure))
    assert (weight == 1).all()
    last = sampler.num_timesteps - 1
    assert (
        0.47 < float((after == last).float().mean() - (before == last).float().mean() * 0.5) < 0.53
    )
    assert torch.equal(after[after != last], before[after != last])
