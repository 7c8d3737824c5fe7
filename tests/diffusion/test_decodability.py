"""The rule for the critical noise, against nearest-row decoding of random embeddings."""

from __future__ import annotations

import math

import pytest
import torch

from dlmone_fast.config import DiffusionConfig
from dlmone_fast.diffusion import Schedule, critical_log_snr, timestep_at
from dlmone_fast.diffusion.decodability import nearest_timesteps


def log_snrs(schedule: Schedule) -> list[float]:
    return [math.log(a / (1 - a)) for a in schedule.alphas_cumprod.tolist()]


def decoded_share(d: int, vocab: int, scale: float, log_snr: float, tokens: int = 1500) -> float:
    """Share of tokens whose nearest row is the right one, at a log-SNR."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(vocab, d, generator=generator)
    table = table / table.norm(dim=1, keepdim=True) * math.sqrt(d) / scale
    ids = torch.randint(vocab, (tokens,), generator=generator)
    alpha_bar = 1 / (1 + math.exp(-log_snr))
    noise = torch.randn(tokens, d, generator=generator)
    x = math.sqrt(alpha_bar) * table[ids] + math.sqrt(1 - alpha_bar) * noise
    nearest = torch.cdist(x, math.sqrt(alpha_bar) * table).argmin(1)
    return float((nearest == ids).float().mean())


@pytest.mark.parametrize(
    ("d", "vocab", "scale"), [(64, 1024, 1.0), (64, 1024, 4.0), (128, 8192, 2.0), (32, 256, 1.5)]
)
def test_about_half_of_the_tokens_decode_at_the_critical_noise(
    d: int, vocab: int, scale: float
) -> None:
    critical = critical_log_snr(d, vocab, scale)
    assert 0.25 < decoded_share(d, vocab, scale, critical) < 0.75
    # The sign: more signal is decodable, less is not.
    assert decoded_share(d, vocab, scale, critical + 1.5) > 0.95
    assert decoded_share(d, vocab, scale, critical - 1.5) < 0.15


def test_the_rule_in_closed_form() -> None:
    snr = math.exp(critical_log_snr(128, 30_522, 2.0))
    assert snr * 128 / 2.0**2 == pytest.approx(2 * math.log(30_522))


@pytest.mark.parametrize("name", ["sqrt", "linear", "cosine"])
def test_the_timestep_is_the_nearest_by_exhaustive_search(name: str) -> None:
    schedule = Schedule(DiffusionConfig(schedule=name, num_timesteps=200))
    table = log_snrs(schedule)
    for value in [*torch.linspace(-12, 12, 97).tolist(), *table]:
        t = timestep_at(schedule, value)
        best = min(abs(value - here) for here in table)
        assert abs(value - table[t]) == pytest.approx(best, abs=1e-9)
    assert [timestep_at(schedule, value) for value in table] == list(range(200))


def test_beyond_the_schedule_its_ends_serve() -> None:
    schedule = Schedule(DiffusionConfig())
    assert timestep_at(schedule, 99.0) == 0
    assert timestep_at(schedule, -99.0) == 1999
    many = nearest_timesteps(schedule, torch.tensor([[99.0, -99.0]], dtype=torch.float64))
    assert many.tolist() == [[0, 1999]]


def test_the_published_t_init_is_at_the_threshold() -> None:
    """sigma / alpha = 2.5 at t = 1490 of DiffuSeq's schedule, d = 128, V = 30,522."""
    t = timestep_at(Schedule(DiffusionConfig()), critical_log_snr(128, 30_522, 1.0))
    assert abs(t - 1490) < 20
