"""The transformer's element-by-element steps, fused for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import checks
from benchmarks.harness.race import Race, ours
from benchmarks.kernels import floors, peers, shapes
from dlmone_fast.kernels import blocks, reference

_EPS = 1e-12
_ROWS_CHECKED = 4


@pytest.mark.shapes(shapes.HIDDEN_STATES)
def test_add_layer_norm(race: Race, shape: shapes.Shape, device: torch.device) -> None:
    """LayerNorm of a sum: two reads, one write."""
    x, residual = _random(shape, device), _random(shape, device)
    arguments = (x, residual, *_scale_and_shift(shape, device), _EPS)
    exact = reference.add_layer_norm(*_first_rows(*arguments))[0]
    _time(race, "add_layer_norm", shape, arguments, exact, passes=3)


@pytest.mark.shapes(shapes.HIDDEN_STATES)
def test_input_layer_norm(race: Race, shape: shapes.Shape, device: torch.device) -> None:
    """LayerNorm of projection, position and time step: one read, one write."""
    x, position = _random(shape, device), torch.randn(shape.size[1:], device=device).to(shape.dtype)
    time = torch.randn(shape.batch, shape.width, device=device).to(shape.dtype)
    scale_and_shift = _scale_and_shift(shape, device)
    arguments = (x, position, time, *scale_and_shift, _EPS)
    rows = (x[:_ROWS_CHECKED], position, time[:_ROWS_CHECKED])
    exact = reference.input_layer_norm(*rows, *scale_and_shift, _EPS)
    _time(race, "input_layer_norm", shape, arguments, exact, passes=2)


@pytest.mark.shapes(shapes.FEED_FORWARD)
def test_bias_gelu(race: Race, shape: shapes.Shape, device: torch.device) -> None:
    """Bias and GELU: one read, one write."""
    _time_activation(race, "bias_gelu", shape, device)


@pytest.mark.shapes(shapes.HIDDEN_STATES)
def test_bias_tanh(race: Race, shape: shapes.Shape, device: torch.device) -> None:
    """Bias and tanh: one read, one write."""
    _time_activation(race, "bias_tanh", shape, device)


def _time_activation(
    race: Race, name: str, shape: shapes.Shape, device: torch.device
) -> None:  # fmt: skip
    x, bias = _random(shape, device), _scale_and_shift(shape, device)[1]
    exact = getattr(reference, name)(x[:_ROWS_CHECKED], bias)
    _time(race, name, shape, (x, bias), exact, passes=2)


def _time(
    race: Race,
    name: str,
    shape: shapes.Shape,
    arguments: tuple[Any, ...],
    exact: Tensor,
    passes: int,
) -> None:
    operation: Callable[..., Tensor] = getattr(blocks, name)

    def run(backend: str) -> Tensor:
        return operation(*arguments, kernel_backend=backend)

    others = peers.eager_and_compiled(getattr(peers, name), *arguments)
    work = floors.elementwise(shape, passes)
    title = name.replace("_", " ")
    race(title, shape, {**ours(name, run), **others}, checks.close_to(exact), work)


def _random(shape: shapes.Shape, device: torch.device) -> Tensor:
    return torch.randn(shape.size, device=device).to(shape.dtype)


def _scale_and_shift(shape: shapes.Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    weight = 1 + 0.1 * torch.randn(shape.width, device=device)
    bias = 0.1 * torch.randn(shape.width, device=device)
    return weight.to(shape.dtype), bias.to(shape.dtype)


def _first_rows(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Any, ...]:
    return (x[:_ROWS_CHECKED], residual[:_ROWS_CHECKED], *rest)
