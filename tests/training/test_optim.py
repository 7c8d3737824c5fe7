"""Learning rates, the moving average, and the guard against non-finite updates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from dlmone_fast.errors import DivergedError
from dlmone_fast.training.optim import Ema, UpdateGuard, adamw, learning_rate


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (1, 0.99), (50, 0.5), (99, 0.01)])
def test_linear_decay_is_diffuseqs_anneal(step: int, expected: float) -> None:
    assert learning_rate(2e-3, step, 100, 0, "linear") == pytest.approx(2e-3 * expected)


def test_cosine_decay_falls_from_the_base_towards_zero() -> None:
    rates = [learning_rate(1.0, step, 100, 0, "cosine") for step in range(100)]
    assert rates[0] == 1
    assert rates[50] == pytest.approx(0.5)
    assert rates[25] == pytest.approx(0.5 + math.sqrt(0.125))
    assert all(a > b > 0 for a, b in itertools.pairwise(rates))


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_warm_up_rises_linearly_to_the_base(decay: str) -> None:
    rates = [learning_rate(4.0, step, 10, 4, decay) for step in range(5)]
    assert rates == [1, 2, 3, 4, 4]
    assert learning_rate(4.0, 3, 4, 4, decay) == 4
    assert learning_rate(4.0, 9, 10, 4, decay) == (
        4
        if decay == "constant"
        else pytest.approx(
            4 * (1 - 5 / 6) if decay == "linear" else 2 * (1 + math.cos(math.pi * 5 / 6))
        )
    )


def test_the_moving_average_has_its_closed_form() -> None:
    module = nn.Linear(2, 1)
    start = module.weight.detach().clone()
    ema = Ema(module, 0.9)
    assert torch.equal(ema.values["weight"], start)
    for value in (1.0, 2.0, 3.0):
        nn.init.constant_(module.weight, value)
        ema.update(module, 0)
    expected = 0.9**3 * start + 0.1 * (0.9**2 * 1 + 0.9 * 2 + 3)
    torch.testing.assert_close(ema.values["weight"], expected)
    assert module.weight.unique().tolist() == [3]


def test_a_warming_average_follows_faster_at_first() -> None:
    module = nn.Linear(2, 1)
    expected = module.weight.detach().clone()
    ema = Ema(module, 0.9, warmup=True)
    # (1 + k) / (10 + k) passes 0.9 at k = 80.
    for step in range(100):
        nn.init.constant_(module.weight, float(step % 7))
        ema.update(module, step)
        decay = (1 + step) / (10 + step) if step < 80 else 0.9
        expected = decay * expected + (1 - decay) * (step % 7)
        torch.testing.assert_close(ema.values["weight"], expected)
    # A resumed run starts at its own step.
    late, plain = Ema(module, 0.9, warmup=True), Ema(module, 0.9)
    nn.init.constant_(module.weight, 5.0)
    late.update(module, 500)
    plain.update(module, 500)
    assert torch.equal(late.values["weight"], plain.values["weight"])


def step_with(
    guard: UpdateGuard,
    module: nn.Linear,
    optimizer: torch.optim.Optimizer,
    gradient: float,
    loss: float = 1.0,
    what: str = "teacher",
    clip_norm: float = 0.0,
    clip_value: float = 0.0,
) -> float | None:
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    return guard.apply(what, torch.tensor(loss), optimizer, clip_norm, clip_value)


def module_and_optimizer() -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    return module, adamw(module, 0.1, 0.9, 0.99, 0.0)


@pytest.mark.parametrize(
    ("gradient", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)]
)
def test_a_step_that_is_not_finite_changes_nothing(gradient: float, loss: float) -> None:
    module, optimizer = module_and_optimizer()
    guard = UpdateGuard(3)
    assert step_with(guard, module, optimizer, 1.0) == pytest.approx(2.0)
    before = [p.detach().clone() for p in module.parameters()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    assert step_with(guard, module, optimizer, gradient, loss) is None
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    after = [s["exp_avg"] for s in optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert guard.skipped == 1
    assert all(p.grad is None for p in module.parameters())


def test_only_failures_in_a_row_end_the_run() -> None:
    module, optimizer = module_and_optimizer()
    guard = UpdateGuard(3)
    for gradient in (math.nan, math.nan, 1.0, math.nan, math.nan):
        step_with(guard, module, optimizer, gradient)
    assert guard.skipped == 4
    with pytest.raises(DivergedError, match=r"teacher: .* not finite 3 steps in a row") as caught:
        step_with(guard, module, optimizer, math.nan)
    assert caught.value.exit_code == 5
    assert guard.skipped == 5


def test_good_steps_of_one_network_do_not_hide_the_failures_of_another() -> None:
    module, optimizer = module_and_optimizer()
    guard = UpdateGuard(2)
    step_with(guard, module, optimizer, math.nan, what="generator")
    step_with(guard, module, optimizer, 1.0, what="score estimator")
    with pytest.raises(DivergedError, match="generator: "):
        step_with(guard, module, optimizer, math.nan, what="generator")


def test_gradients_are_clipped_by_value_and_by_norm_and_the_raw_norm_is_told() -> None:
    for clip_norm, clip_value, expected in ((0.5, 0.0, 0.25), (0.0, 0.75, 0.75), (0.0, 0.0, 3.0)):
        module, _ = module_and_optimizer()
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        before = module.weight.detach().clone()
        norm = step_with(
            UpdateGuard(1), module, optimizer, 3.0, clip_norm=clip_norm, clip_value=clip_value
        )
        assert norm == pytest.approx(6.0)
        torch.testing.assert_close(before - module.weight, torch.full((1, 3), expected))


def test_what_both_clips_leave_has_the_largest_norm() -> None:
    module, _ = module_and_optimizer()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    before = module.weight.detach().clone()
    norm = step_with(UpdateGuard(1), module, optimizer, 3.0, clip_norm=1.0, clip_value=0.75)
    # Four entries of 0.75 have the norm 1.5: two thirds of them are left.
    assert norm == pytest.approx(6.0)
    torch.testing.assert_close(before - module.weight, torch.full((1, 3), 0.5))
    before = module.weight.detach().clone()
    step_with(UpdateGuard(1), module, optimizer, 3.0, clip_norm=2.0, clip_value=0.75)
    torch.testing.assert_close(before - module.weight, torch.full((1, 3), 0.75))
