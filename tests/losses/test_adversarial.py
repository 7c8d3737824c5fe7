"""The adversarial terms as cross-entropies of probabilities, with clamped logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dlmone_fast.losses.adversarial import discriminator_loss, generator_adversarial_loss

REAL_MASK = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
FAKE_MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])


@pytest.fixture
def logits() -> Tensor:
    """Logits [2, B, L] of real and generated text."""
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(2, 2, 4, generator=generator, dtype=torch.float64)


def by_probability(logits: Tensor, mask: Tensor, row: int, label: float) -> float:
    chosen = logits[row][mask[row] == 1].sigmoid()
    return float(F.binary_cross_entropy(chosen, torch.full_like(chosen, label)))


def test_the_discriminator_learns_real_from_generated(logits: Tensor) -> None:
    real, fake = logits
    loss = discriminator_loss(real, REAL_MASK, fake, FAKE_MASK, 10.0)
    for row in range(2):
        expected = by_probability(real, REAL_MASK, row, 1) + by_probability(fake, FAKE_MASK, row, 0)
        assert float(loss[row]) == pytest.approx(expected / 2, abs=1e-12)


def test_the_generator_wants_to_be_taken_for_real(logits: Tensor) -> None:
    fake = logits[1].requires_grad_()
    loss = generator_adversarial_loss(fake, FAKE_MASK, 10.0)
    for row in range(2):
        expected = by_probability(fake.detach(), FAKE_MASK, row, 1)
        assert float(loss[row].detach()) == pytest.approx(expected, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), fake)
    assert bool((gradient[FAKE_MASK == 1] < 0).all())
    assert bool((gradient[FAKE_MASK == 0] == 0).all())


def test_an_undecided_discriminator_costs_log_two() -> None:
    zero = torch.zeros(2, 4)
    loss = discriminator_loss(zero, REAL_MASK, zero, FAKE_MASK, 10.0)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("clamp", [10.0, 0.0])
def test_logits_are_clamped_unless_turned_off(clamp: float) -> None:
    fake = torch.full((1, 2), -50.0, requires_grad=True)
    loss = generator_adversarial_loss(fake, torch.ones(1, 2), clamp)
    assert loss.item() == pytest.approx(math.log1p(math.exp(10)) if clamp else 50.0)
    (gradient,) = torch.autograd.grad(loss.sum(), fake)
    assert bool((gradient == 0).all()) == bool(clamp)
