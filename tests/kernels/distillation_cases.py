"""What the tests of the distillation loss share."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

BACKENDS = ("torch", "triton")
FLOOR = 0.05


class Inputs(NamedTuple):
    """x, x̂_φ and x̂_ψ, leaves that want a gradient."""

    x: Tensor
    teacher: Tensor
    score: Tensor


def inputs(
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(3, *shape, generator=generator).to(device, dtype)
    return Inputs(*(part.clone().requires_grad_() for part in parts))


def mask_of(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Targets at random places; none at all in the second sample."""
    mask = torch.rand(shape[:2], generator=torch.Generator().manual_seed(9)) < 0.6
    mask[:, -1] = True
    mask[1:2] = False
    return mask.long().to(device)


def gradients(loss: Tensor, leaves: Inputs, upstream: Tensor, retain: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(
        loss, leaves, upstream.to(loss.dtype), retain_graph=retain, allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


@pytest.fixture(params=["whole", "parts"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """A shape of samples that a program takes whole, and one spread over three programs."""
    if request.param == "whole":
        return 3, 9, 20
    # As in samples over 32768 numbers, which the interpreter takes seconds for.
    kernels = pytest.importorskip("dlmone_fast.kernels.distillation_loss.triton")
    monkeypatch.setattr(kernels, "_WHOLE", 0)
    monkeypatch.setattr(kernels, "_TILES", 1)
    return 3, 260, 20
