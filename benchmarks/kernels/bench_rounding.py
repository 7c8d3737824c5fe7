"""Nearest-token rounding to BERT's vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.harness import checks
from benchmarks.harness.race import Race, ours
from benchmarks.kernels import floors, peers, shapes
from dlmone_fast.kernels.nearest_token import Vocabulary, nearest_token


@pytest.mark.shapes(shapes.ROUNDING)
def test_rounding(race: Race, shape: shapes.Tokens, device: torch.device) -> None:
    """ids [N] of x [N, 128]; the table is prepared beforehand, as a loaded model has it."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(shapes.VOCABULARY, shapes.CHANNELS, generator=generator)
    ids = torch.randint(shapes.VOCABULARY, (shape.count,), generator=generator)
    x = table[ids] + 0.5 * torch.randn(shape.count, shapes.CHANNELS, generator=generator)
    x, table = x.to(device, shape.dtype), table.to(device)
    vocabulary = Vocabulary(table)
    exact = checks.nearest_ids(x, table)

    def run(backend: str) -> Tensor:
        return nearest_token(x, vocabulary, kernel_backend=backend)

    implementations = {**ours("nearest_token", run), **peers.rounding(x, table)}
    precision = "bf16" if device.type == "cuda" else "fp32"
    work = floors.rounding(shape.count, precision)
    race("rounding", shape, implementations, checks.same_ids(exact), work)
