from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlmone_fast.errors import BackendUnavailableError, UsageError
from dlmone_fast.kernels.distillation_loss import distillation_loss, reference, weight_floor
from tests.kernels.distillation_cases import (
    BACKENDS,
    FLOOR,
    Inputs,
    gradients,
    inputs,
    layout,
    mask_of,
)
from tests.kernels.tolerances import assert_matches

__all__ = ["layout"]

# Batch, positions, channels: tiles that do not fill, one number, the two tile widths.
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 33, 128), (2, 129, 40), (1, 3, 300)]
CASES = [
    *((shape, form, mu) for shape in SHAPES for form, mu in (("sid", 0.5), ("kl", 1.0))),
    ((2, 33, 128), "sid", 1.0),
    ((2, 33, 40), "sid", 1.2),
    # Over 32768 numbers a sample.
    ((2, 190, 200), "sid", 1.2),
]


def plain(parts: Inputs, mask: Tensor, form: str, mu: float, h: Tensor) -> Tensor:
    """The formulas in plain torch, in the dtype of the inputs."""
    target = (mask != 0).unsqueeze(-1).to(parts.x.dtype)
    n = (target.sum((1, 2)) * parts.x.shape[2]).clamp(min=1)
    weight = ((parts.x - parts.teacher).abs() * target).sum((1, 2)) / n
    a, r = parts.teacher - parts.score, parts.score - parts.x
    terms = -a.detach() * parts.x if form == "kl" else (1 - mu) * a * a + a * r
    return h * (terms * target).sum((1, 2)) / (weight.clamp(min=FLOOR).detach() * n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "form", "mu"), CASES, ids=str)
def test_loss_weight_and_gradients_are_the_references(
    backend: str, shape: tuple[int, int, int], form: Any, mu: float, device: torch.device
) -> None:
    parts, mask = inputs(shape, device), mask_of(shape, device)
    h = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).to(device) + 0.5
    loss, weight = distillation_loss(
        *parts, mask, form=form, mu=mu, weight_floor=FLOOR, multiplier=h, kernel_backend=backend
    )
    exact, exact_weight = reference.distillation_loss(*parts, mask, form, mu, FLOOR, h)
    assert loss.dtype == weight.dtype == torch.float32
    assert_matches(loss.detach(), exact.detach(), scale=float(h.max()))
    assert_matches(weight, exact_weight)
    upstream = torch.linspace(-1, 2, shape[0], device=device)
    expected = gradients(exact, parts, upstream)
    for got, wanted in zip(gradients(loss, parts, upstream), expected, strict=True):
        assert_matches(got, wanted)
        assert bool(got[mask == 0].eq(0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("form", "mu"), [("sid", 1.2), ("kl", 0.0)])
def test_16_bit_inputs(
    backend: str, dtype: torch.dtype, form: Any, mu: float, device: torch.device
) -> None:
    shape = (2, 40, 128)
    parts, mask = inputs(shape, device, dtype), mask_of(shape, device)
    h = torch.ones(2, device=device)
    loss, weight = distillation_loss(
        *parts, mask, form=form, mu=mu, weight_floor=FLOOR, kernel_backend=backend
    )
    exact, exact_weight = reference.distillation_loss(*parts, mask, form, mu, FLOOR)
    # Computed in fp32 whatever the inputs are.
    assert_matches(loss.detach(), exact.detach(), scale=1.0)
    assert_matches(weight, exact_weight)
    upstream = torch.tensor([0.7, 1.0], device=device)
    expected = gradients(exact, parts, upstream)
    roughly = gradients(plain(parts, mask, form, mu, h.to(dtype)), parts, upstream)
    for got, wanted, rough in zip(gradients(loss, parts, upstream), expected, roughly, strict=True):
        assert got.dtype == dtype
        assert_matches(got, wanted, rough)


@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_that_almost_agree_in_bf16(backend: str, device: torch.device) -> None:
    # ψ begins as a copy of φ: A is a few units in the last place of the inputs.
    shape = (2, 32, 64)
    parts = inputs(shape, device, torch.bfloat16)
    step = 1 + 2.0**-7 * torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(3))
    parts = parts._replace(
        score=(parts.teacher.detach() * step.to(device, torch.bfloat16)).requires_grad_()
    )
    mask = torch.ones(shape[:2], device=device)
    loss, _ = distillation_loss(*parts, mask, mu=1.2, weight_floor=FLOOR, kernel_backend=backend)
    exact, _ = reference.distillation_loss(*parts, mask, "sid", 1.2, FLOOR)
    ones = torch.ones(2, device=device)
    expected = gradients(exact, parts, ones)
    for got, wanted in zip(gradients(loss, parts, ones), expected, strict=True):
        # One rounding of each gradient relative to itself, two steps where it truncates.
        error = (got.double() - wanted).abs() / wanted.abs().clamp(min=1e-12)
        assert float(error.max()) <= 2.0**-7
    torch.testing.assert_close(loss.detach().double(), exact.detach(), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("form", ["sid", "kl"])
def test_the_reference_has_the_gradient_of_its_formula(form: str) -> None:
    # With the stopped parts held fixed, numerical differences see the constants as constants.
    generator = torch.Generator().manual_seed(4)
    parts = torch.randn(3, 2, 4, 3, dtype=torch.float64, generator=generator)
    leaves = [part.clone().requires_grad_() for part in parts]
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    a = parts[1] - parts[2]
    # A floor above every distance makes w constant.
    if form == "sid":
        assert torch.autograd.gradcheck(
            lambda *t: reference.distillation_loss(*t, mask, "sid", 1.2, 100.0)[0], leaves
        )
        return
    loss, _ = reference.distillation_loss(*leaves, mask, "kl", 1.0, 100.0)
    (of_x,) = torch.autograd.grad(loss.sum(), leaves[0])
    n = mask.sum(1).mul(3).view(-1, 1, 1)
    torch.testing.assert_close(of_x, -a * (mask != 0).unsqueeze(-1) / (100.0 * n))
    assert all(
        g is None for g in torch.autograd.grad(
            reference.distillation_loss(*leaves, mask, "kl", 1.0, 100.0)[0].sum(),
            leaves[1:], allow_unused=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mu", [0.5, 1.0, 1.2])
def test_agrees_with_the_official_form(backend: str, mu: float, device: torch.device) -> None:
    shape = (3, 20, 24)
    parts = inputs(shape, device)
    mask = (torch.arange(20, device=device) >= 8).long().expand(3, 20)
    loss, weight = distillation_loss(
        *parts, mask, mu=mu, weight_floor=FLOOR, kernel_backend=backend
    )
    x, teacher, score = (part.detach()[:, 8:] for part in parts)
    a = teacher - score
    official = (a * ((teacher - x) - mu * a)).mean((1, 2)) / weight
    torch.testing.assert_close(loss.detach(), official)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_floor_of_the_weight_acts(backend: str, device: torch.device) -> None:
    parts = inputs((2, 6, 8), device)
    near = parts._replace(x=(parts.teacher.detach() + 1e-4).requires_grad_())
    mask = torch.ones(2, 6, device=device)
    for floor, expected in ((0.3, 0.3), (1e-6, 1e-4)):
        _, weight = distillation_loss(*near, mask, weight_floor=floor, kernel_backend=backend)
        assert weight.tolist() == pytest.approx([expected] * 2, rel=2e-3)
        assert not weight.requires_grad


def test_weight_floor_is_a_fraction_of_the_root_mean_square() -> None:
    embedding = torch.tensor([[3.0, -4.0], [0.0, 5.0]], requires_grad=True)
    assert weight_floor(0.05, embedding) == pytest.approx(0.05 * 12.5**0.5)
    assert weight_floor(0.05, torch.zeros(4, 2)) == 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["sid", "kl"])
def test_what_source_positions_hold_cannot_leak(
    backend: str, layout: tuple[int, int, int], form: Any, device: torch.device
) -> None:
    parts, mask = inputs(layout, device), mask_of(layout, device)
    source = (mask == 0).unsqueeze(-1)
    poisoned = Inputs(
        *(torch.where(source, bad, part.detach()).requires_grad_()
          for part, bad in zip(parts, (torch.nan, torch.inf, torch.nan), strict=True))
    )  # fmt: skip
    upstream = torch.tensor([1.0, 2.0, -1.0], device=device)
    results = []
    for leaves in (parts, poisoned):
        loss, weight = distillation_loss(
            *leaves, mask, form=form, weight_floor=FLOOR, kernel_backend=backend
        )
        results.append([loss, weight, *gradients(loss, leaves, upstream)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_number_at_a_target_shows_in_its_sample_only(
    backend: str, device: torch.device
) -> None:
    parts = inputs((3, 4, 5), device)
    mask = torch.ones(3, 4, device=device)
    mask[1, 0] = 0
    with torch.no_grad():
        parts.x[1, 2, 3] = torch.nan
    loss, weight = distillation_loss(*parts, mask, weight_floor=FLOOR, kernel_backend=backend)
    assert loss.isnan().tolist() == weight.isnan().tolist() == [False, True, False]
    for got in gradients(loss, parts, torch.ones(3, device=device)):
        assert bool(got[[0, 2]].isfinite().all())
        assert bool(got[1, 0].eq(0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_does_not_depend_on_its_companions_and_runs_repeat(
    backend: str, device: torch.device
) -> None:
    shape = (3, 33, 40)
    parts, mask = inputs(shape, device), mask_of(shape, device).bool()
    ones = torch.ones(3, device=device)
    runs = [
        distillation_loss(*parts, mask, weight_floor=FLOOR, kernel_backend=backend)
        for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    grads = [gradients(loss, parts, ones) for loss, _ in runs]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    alone = Inputs(*(part.detach()[2:].requires_grad_() for part in parts))
    loss, weight = distillation_loss(*alone, mask[2:], weight_floor=FLOOR, kernel_backend=backend)
    assert torch.equal(loss, runs[0][0][2:])
    assert torch.equal(weight, runs[0][1][2:])
    for got, whole in zip(gradients(loss, alone, ones[2:]), grads[0], strict=True):
        assert torch.equal(got, whole[2:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_masks_of_other_dtypes_and_strided_inputs(
    backend: str, dtype: torch.dtype, device: torch.device
) -> None:
    storage = torch.randn(3, 2, 8, 14, generator=torch.Generator().manual_seed(0)).to(device)
    x, teacher, score = (part[..., ::2].transpose(1, 2).transpose(1, 2) for part in storage)
    mask = torch.tensor([[0, 3, 0, 1, 1, 1, 0, 1]] * 2, device=device)
    expected, _ = reference.distillation_loss(x, teacher, score, mask, "sid", 1.0, FLOOR)
    loss, _ = distillation_loss(
        x, teacher, score, mask.to(dtype), weight_floor=FLOOR, kernel_backend=backend
    )
    assert_matches(loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_as_multiplier_is_the_same_for_every_sample(
    backend: str, device: torch.device
) -> None:
    parts, mask = inputs((2, 5, 8), device), torch.ones(2, 5, device=device)
    both = [
        distillation_loss(*parts, mask, weight_floor=FLOOR, multiplier=h, kernel_backend=backend)[0]
        for h in (0.25, torch.full((2,), 0.25, device=device, requires_grad=True))
    ]
    assert torch.equal(*both)
    for a, b in zip(*(gradients(loss, parts, torch.ones(2)) for loss in both), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)], ids=str)
def test_empty(backend: str, shape: tuple[int, int, int], device: torch.device) -> None:
    parts = inputs(shape, device)
    mask = torch.ones(shape[:2], device=device)
    loss, weight = distillation_loss(*parts, mask, weight_floor=0.5, kernel_backend=backend)
    assert loss.tolist() == [0.0] * shape[0]
    assert weight.tolist() == [0.5] * shape[0]
    loss.sum().backward()
    assert parts.x.grad is not None
    assert parts.x.grad.shape == shape


def test_a_backend_that_cannot_run_is_refused(device: torch.device) -> None:
    parts, mask = inputs((1, 2, 3), device), torch.ones(1, 2, device=device)
    with pytest.raises(BackendUnavailableError, match=r"has no such backend.*torch"):
        distillation_loss(*parts, mask, weight_floor=FLOOR, kernel_backend="cpp")


ZEROS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x must have shape \[B, L, d\].*\(2, 3\)"),
        ({"x": torch.zeros(2, 3, 0)}, "x must have shape"),
        ({"x0_teacher": torch.zeros(2, 3, 5)}, r"x0_teacher must have the shape of x.*\(2, 3, 5\)"),
        ({"x0_score": ZEROS.half()}, r"x0_score is torch.float16.*one dtype"),
        ({"x": ZEROS.double()}, r"x must be float32.*\.float\(\)"),
        ({"x0_score": ZEROS.to("meta")}, "x0_score is on meta and x on cpu"),
        ({"mask": torch.ones(2, 4)}, r"mask must have shape \[B, L\] = \(2, 3\), got \(2, 4\)"),
        ({"mask": torch.ones(2, 3, device="meta")}, "mask is on meta"),
        ({"form": "fisher"}, "form must be .sid. or .kl., got 'fisher'"),
        ({"mu": float("nan")}, "mu must be a finite number"),
        ({"weight_floor": 0.0}, r"weight_floor must lie in.*got 0\.0"),
        ({"weight_floor": float("nan")}, "weight_floor must lie in"),
        ({"multiplier": torch.ones(3)}, r"multiplier must be a number or.*\[2\], got.*\(3,\)"),
        ({"multiplier": torch.ones(2, dtype=torch.int64)}, "multiplier must be"),
    ],
)
def test_refusals_name_the_argument(change: dict[str, Any], message: str) -> None:
    given = {"x": ZEROS, "x0_teacher": ZEROS, "x0_score": ZEROS, "mask": torch.ones(2, 3)}
    with pytest.raises(UsageError, match=message):
        distillation_loss(**{**given, "weight_floor": FLOOR, **change})
