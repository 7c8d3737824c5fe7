"""Whole calls of `generate` against batch, length, vocabulary, candidates and CPU threads.

One backend of ours, the one that "auto" takes first, beside plain PyTorch around the same network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.generate import cases
from benchmarks.generate import targets as names
from benchmarks.generate.candidates import candidate_calls
from benchmarks.generate.cases import Point
from benchmarks.generate.lineup import Lineup
from benchmarks.generate.ours import owns
from benchmarks.generate.peers import peers
from benchmarks.generate.trained import TrainedGate
from benchmarks.harness.race import Race

_SECONDS_EACH = 0.3


@pytest.mark.shapes(cases.POINTS)
def test_scaling(whole: Race, shape: Point, device: torch.device, gate: TrainedGate) -> None:
    """Time at one value of an axis; several candidates include the choice of one of them."""
    case, model = shape.case, cases.model(shape.case.config, device)
    with _threads(shape.threads):
        lineup = Lineup(model, case.batch, gate)
        own = next(c for c in owns(model) if lineup.add(c, parts=False))
        plain = next(p for p in peers(model, Path()) if p.name == names.EAGER_FP32)
        lineup.add(plain, parts=False)
        kept = [own.name, plain.name]
        calls = {name: lineup.calls[name] for name in kept}
        if shape.candidates:
            calls = dict(zip(kept, candidate_calls(own, plain, case.batch), strict=True))
        precision = own.precision if own.precision == "fp32" else "bf16"
        replace(whole, seconds_each=_SECONDS_EACH)(
            f"{names.OPERATION} by {shape.axis}", shape, calls, None, cases.work(case, precision),
            fields={name: {**lineup.fields[name], "at": shape.value} for name in kept},
        )  # fmt: skip


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
