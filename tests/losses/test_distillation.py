"""The definition of the SiD loss, against Eq. 4 written as loops, and its gradients through
networks; the score matching of ψ. Every backend of the loss is held against this definition."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dlmone_fast.kernels.distillation_loss.reference import distillation_loss
from dlmone_fast.losses.distillation import score_matching_loss

MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
MUS = (0.0, 0.5, 1.0, 1.2)


class Case(NamedTuple):
    """Generated x, and the predictions of φ and ψ, fp64 [B, L, d]."""

    x: Tensor
    teacher: Tensor
    score: Tensor


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(0)
    return Case(*torch.randn(3, 3, 5, 4, generator=generator, dtype=torch.float64))


def target_entries(row: int) -> list[tuple[int, int]]:
    return [(p, c) for p in range(5) if MASK[row, p] for c in range(4)]


def printed(case: Case, row: int, mu: float, weight: float) -> float:
    """Eq. 4 as printed: (1 - mu) ‖φ - ψ‖² + (φ - ψ)ᵀ(ψ - x), by entry, over w."""
    squares = cross = 0.0
    entries = target_entries(row)
    for p, c in entries:
        x, phi, psi = (float(part[row, p, c]) for part in case)
        squares += (phi - psi) ** 2
        cross += (phi - psi) * (psi - x)
    return ((1 - mu) * squares + cross) / len(entries) / weight


def as_coded_elsewhere(case: Case, row: int, mu: float, weight: float) -> float:
    """The form of the SiD family's code: (φ - ψ)·[(φ - x) - mu (φ - ψ)] / w."""
    total = 0.0
    entries = target_entries(row)
    for p, c in entries:
        x, phi, psi = (float(part[row, p, c]) for part in case)
        total += (phi - psi) * ((phi - x) - mu * (phi - psi))
    return total / len(entries) / weight


@pytest.mark.parametrize("mu", MUS)
def test_the_loss_is_equation_4(case: Case, mu: float) -> None:
    loss, weight = distillation_loss(*case, MASK, "sid", mu, 1e-5)
    assert loss.shape == (3,)
    for row in range(3):
        w = float(weight[row])
        assert float(loss[row]) == pytest.approx(printed(case, row, mu, w), abs=1e-12)
        assert float(loss[row]) == pytest.approx(as_coded_elsewhere(case, row, mu, w), abs=1e-12)


def test_the_weight_is_the_mean_distance_to_the_teacher(case: Case) -> None:
    _, weight = distillation_loss(*case, MASK, "sid", 1.0, 1e-5)
    for row in range(3):
        entries = target_entries(row)
        distance = sum(abs(float(case.x[row, p, c] - case.teacher[row, p, c])) for p, c in entries)
        assert float(weight[row]) == pytest.approx(distance / len(entries), abs=1e-12)
    _, at_the_floor = distillation_loss(case.x, case.x, case.score, MASK, "sid", 1.0, 0.25)
    assert at_the_floor.tolist() == [0.25] * 3


def networks(x_t: Tensor) -> tuple[Tensor, Tensor]:
    """Small differentiable stand-ins for φ and ψ."""
    generator = torch.Generator().manual_seed(5)
    first, second = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    mixed = x_t + 0.3 * x_t.mean(1, keepdim=True)
    return torch.tanh(mixed @ first), torch.sin(mixed @ second)


def through_networks(x: Tensor, mu: float, floor: float = 1e-5) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return distillation_loss(x, *networks(0.6 * x + 0.8 * noise), MASK, "sid", mu, floor)[0]


@pytest.mark.parametrize("mu", MUS)
def test_gradients_flow_through_x_and_both_networks(case: Case, mu: float) -> None:
    x = case.x.clone().requires_grad_()
    # A floor above every distance makes the weight a constant, also to numerical differences.
    assert torch.autograd.gradcheck(lambda value: through_networks(value, mu, floor=50.0), x)


def test_the_weight_carries_no_gradient(case: Case) -> None:
    x = case.x.clone().requires_grad_()
    (found,) = torch.autograd.grad(through_networks(x, 1.2).sum(), x)
    (of_constant,) = torch.autograd.grad(through_networks(x, 1.2, floor=50.0).sum(), x)
    generator = torch.Generator().manual_seed(6)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    teacher, score = networks(0.6 * case.x + 0.8 * noise)
    _, weight = distillation_loss(case.x, teacher, score, MASK, "sid", 1.2, 1e-5)
    # The gradient mixes positions of one sample only, so its weight is a factor.
    torch.testing.assert_close(found, of_constant * (50.0 / weight).view(-1, 1, 1))


def test_source_positions_do_not_count(case: Case) -> None:
    source = (MASK == 0).unsqueeze(-1)
    other = Case(*(torch.where(source, part + 7, part) for part in case))
    results = []
    for parts in (case, other):
        loss, weight = distillation_loss(*parts, MASK, "sid", 1.2, 1e-5)
        matching = score_matching_loss(parts.x, parts.score, MASK)
        results.append(torch.stack([loss, weight, matching]))
    assert torch.equal(results[0], results[1])


def test_score_matching_is_the_mean_square_over_target_entries(case: Case) -> None:
    loss = score_matching_loss(case.x, case.score, MASK)
    for row in range(3):
        entries = target_entries(row)
        squares = sum(float(case.x[row, p, c] - case.score[row, p, c]) ** 2 for p, c in entries)
        assert float(loss[row]) == pytest.approx(squares / len(entries), abs=1e-12)
