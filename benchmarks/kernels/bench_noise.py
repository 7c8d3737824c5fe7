"""Counter-based normal noise, beside torch's own generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.harness import checks
from benchmarks.harness.race import EAGER, Race, ours
from benchmarks.kernels import floors, shapes
from dlmone_fast.kernels import reference
from dlmone_fast.kernels.noise import Stream, draws_of, normal_of_draws

_ROWS_CHECKED = 4


@pytest.mark.shapes(shapes.NOISE)
def test_noise(race: Race, shape: shapes.Shape, device: torch.device) -> None:
    """Normals [B, 128, 128]; the draws are in place beforehand, as a runtime has them."""
    samples = torch.arange(shape.batch, device=device)
    draws = draws_of(1, samples, 0, device)
    size = (shape.length, shape.width)
    exact = reference.normal(draws[:_ROWS_CHECKED], Stream.GENERATION, *size)

    def run(backend: str) -> Tensor:
        return normal_of_draws(draws, Stream.GENERATION, *size, kernel_backend=backend)

    race(
        "noise",
        shape,
        {**ours("noise", run), EAGER: lambda: torch.randn(shape.size, device=device)},
        checks.close_to(exact),
        floors.noise(shape),
        check_peer=checks.standard_normal(),
    )
