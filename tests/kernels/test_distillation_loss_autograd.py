"""The distillation loss in autograd: repeated passes, partial gradients, compiled graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import dispatch
from dlmone_fast.kernels.distillation_loss import distillation_loss
from dlmone_fast.kernels.distillation_loss.op import GRADIENTS, _forward, _gradients
from tests.kernels.distillation_cases import (
    BACKENDS,
    FLOOR,
    gradients,
    inputs,
    layout,
    mask_of,
)

__all__ = ["layout"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_passes_repeat_and_leave_what_they_gave_alone(
    backend: str, layout: tuple[int, int, int], device: torch.device
) -> None:
    parts, mask = inputs(layout, device), mask_of(layout, device)
    loss, _ = distillation_loss(*parts, mask, mu=1.2, weight_floor=FLOOR, kernel_backend=backend)
    ones = torch.ones(3, device=device)
    # The first may take the gradients made in the forward pass; later ones may not touch them.
    first = gradients(loss, parts, ones, retain=True)
    kept = [part.clone() for part in first]
    mixed = torch.tensor([1.0, -3.0, 0.25], device=device)
    second = gradients(loss, parts, mixed, retain=True)
    third = gradients(loss, parts, ones)
    for a, b, c, d in zip(first, kept, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, d)
        torch.testing.assert_close(c, a * mixed.view(-1, 1, 1), rtol=1e-6, atol=1e-9)
    fresh, _ = distillation_loss(*parts, mask, mu=1.2, weight_floor=FLOOR, kernel_backend=backend)
    for a, b in zip(second, gradients(fresh, parts, mixed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_and_a_diagnostic_before_it(backend: str, device: torch.device) -> None:
    # As training does: the gradient at x alone first, then backward through everything.
    parts = inputs((2, 6, 8), device)
    mask = torch.ones(2, 6, device=device)
    loss, _ = distillation_loss(*parts, mask, weight_floor=FLOOR, kernel_backend=backend)
    (of_x,) = torch.autograd.grad(loss.sum(), parts.x, retain_graph=True)
    (loss.sum() / 4).backward()
    torch.testing.assert_close(parts.x.grad, of_x / 4)
    assert parts.teacher.grad is not None
    assert parts.score.grad is not None


def test_a_factor_of_one_costs_no_second_computation(device: torch.device) -> None:
    # A wrong input after the forward pass would show in anything computed again.
    parts, mask = inputs((3, 9, 20), device), torch.ones(3, 9, device=device)
    expected = gradients(
        distillation_loss(*parts, mask, weight_floor=FLOOR, kernel_backend="torch")[0],
        parts, torch.tensor([1.0, 2.0, 1.0], device=device),
    )  # fmt: skip
    loss, _ = distillation_loss(*parts, mask, weight_floor=FLOOR, kernel_backend="triton")
    with torch.no_grad():
        for part in parts:
            part.data.mul_(torch.tensor([5.0, 1.0, 7.0], device=device).view(-1, 1, 1))
    got = gradients(loss, parts, torch.tensor([1.0, 2.0, 1.0], device=device))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_wanted(backend: str, device: torch.device) -> None:
    parts, mask = inputs((2, 5, 8), device), torch.ones(2, 5, device=device)
    ones = torch.ones(2, device=device)

    def run(*leaves: Tensor) -> Tensor:
        return distillation_loss(*leaves, mask, weight_floor=FLOOR, kernel_backend=backend)[0]

    every = gradients(run(*parts), parts, ones)
    (alone,) = torch.autograd.grad(run(parts.x, *(p.detach() for p in parts[1:])), parts.x, ones)
    assert torch.equal(alone, every[0])
    (score,) = torch.autograd.grad(
        run(parts.x.detach(), parts.teacher.detach(), parts.score), parts.score, ones
    )
    assert torch.equal(score, every[2])
    kl, _ = distillation_loss(
        parts.x.detach(), *parts[1:], mask, form="kl", weight_floor=FLOOR, kernel_backend=backend
    )
    assert not kl.requires_grad
    with torch.no_grad():
        silent = run(*parts)
    assert not silent.requires_grad
    assert torch.equal(silent, run(*parts))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["sid", "kl"])
def test_compiles_as_one_graph_forward_and_backward(
    backend: str, form: Any, device: torch.device
) -> None:
    parts, mask = inputs((2, 7, 20), device), mask_of((2, 7, 20), device)
    h = torch.tensor([0.5, 2.0], device=device)

    def step(x: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
        loss, weight = distillation_loss(
            2 * x, teacher + 1, score, mask,
            form=form, mu=1.2, weight_floor=FLOOR, multiplier=h, kernel_backend=backend,
        )  # fmt: skip
        return 3 * loss + weight

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    upstream = torch.tensor([1.0, -2.0], device=device)
    eager, traced = step(*parts), compiled(*parts)
    assert torch.equal(eager, traced)
    pairs = zip(gradients(eager, parts, upstream), gradients(traced, parts, upstream), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_second_derivative(backend: str, device: torch.device) -> None:
    parts, mask = inputs((2, 5, 8), device), torch.ones(2, 5, device=device)
    loss, _ = distillation_loss(*parts, mask, weight_floor=FLOOR, kernel_backend=backend)
    with pytest.raises(UsageError, match=r"differentiated again.*create_graph"):
        torch.autograd.grad(loss.sum(), parts.x, create_graph=True)


def test_the_backward_pass_runs_on_the_forward_passes_backend(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    spied = tuple(
        dispatch.Backend(
            backend.name, backend.usable,
            lambda *a, b=backend: (ran.append(b.name), b.run(*a))[1], backend.automatic,
        )
        for backend in dispatch.backends(GRADIENTS)
    )  # fmt: skip
    monkeypatch.setitem(dispatch._BACKENDS, GRADIENTS, spied)
    parts, mask = inputs((2, 5, 8), device), torch.ones(2, 5, device=device)
    for name in BACKENDS:
        with dispatch.force_backend(name):
            loss, _ = distillation_loss(*parts, mask, weight_floor=FLOOR)
        loss.sum().backward()
    assert ran == list(BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_operators_do_what_their_traces_say(backend: str, count: int, device: torch.device) -> None:
    x, teacher, score = (part.detach() for part in inputs((2, 5, 8), device))
    mask, h = torch.ones(2, 5, device=device), torch.ones(2, device=device)
    checks = ("test_schema", "test_faketensor")
    arguments = (x, teacher, score, mask, h, 1.0, False, -0.2, FLOOR, count, backend)
    torch.library.opcheck(_forward.custom_op, arguments, test_utils=checks)
    if count:
        scaled = (x, teacher, score, mask, h, 2 * h, -0.2, count, backend)
        torch.library.opcheck(_gradients.custom_op, scaled, test_utils=checks)
