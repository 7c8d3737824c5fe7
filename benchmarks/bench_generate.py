"""Whole calls of `generate`, text in to text out, beside other libraries around the same network.

Answers are compared with those of eager fp32 on the same noise before anything is timed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import generate_cases as cases
from benchmarks import generate_targets as names
from benchmarks.generate_candidates import candidate_calls
from benchmarks.generate_cases import Case, Model, Point
from benchmarks.generate_lineup import Lineup
from benchmarks.generate_ours import Own, owns
from benchmarks.generate_peers import Peer, peers
from benchmarks.race import Race
from benchmarks.timing import Call
from benchmarks.trained import TrainedGate

_SCALING_SECONDS = 0.3


@pytest.mark.shapes(cases.CASES)
def test_generate(
    whole: Race, shape: Case, device: torch.device, folder: Path, gate: TrainedGate, full: bool
) -> None:
    """Every backend and peer: the call, its network alone, and the parts around the network."""
    if shape.full and not full:
        pytest.skip("takes a minute and a half on a CPU; give --full")
    model = cases.model(shape.config, device)
    lineup = Lineup(model, shape.batch, gate)
    for contender in _contenders(model, folder, torch.get_num_threads()):
        # On a CPU a peer's network in batches says nothing new, slowly.
        lineup.add(
            contender, device.type == "cuda" or shape.batch == 1 or isinstance(contender, Own)
        )
    lineup.add_phases()
    precision = "fp32" if device.type == "cpu" else "bf16"
    work = cases.work(shape, precision)
    whole(names.OPERATION, shape, lineup.calls, None, work, fields=lineup.fields)


@pytest.mark.shapes(cases.BATCHES)
def test_generate_scaling_with_batch(
    whole: Race, shape: Point, device: torch.device, gate: TrainedGate
) -> None:
    """Time against the number of prompts."""
    _time_point(whole, shape, device, gate)


@pytest.mark.shapes(cases.LENGTHS)
def test_generate_scaling_with_length(
    whole: Race, shape: Point, device: torch.device, gate: TrainedGate
) -> None:
    """Time against the network's length."""
    _time_point(whole, shape, device, gate)


@pytest.mark.shapes(cases.VOCABULARIES)
def test_generate_scaling_with_vocabulary(
    whole: Race, shape: Point, device: torch.device, gate: TrainedGate
) -> None:
    """Time against the number of words that rounding searches."""
    _time_point(whole, shape, device, gate)


@pytest.mark.shapes(cases.CANDIDATES)
def test_generate_scaling_with_candidates(
    whole: Race, shape: Point, device: torch.device, gate: TrainedGate
) -> None:
    """Time against the candidates of one prompt, the choice of one of them included."""
    _time_point(whole, shape, device, gate, candidate_calls)


@pytest.mark.shapes(cases.threads_up_to(os.cpu_count() or 1))
def test_generate_scaling_with_threads(
    whole: Race, shape: Point, device: torch.device, gate: TrainedGate
) -> None:
    """Time against the number of CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(shape.value)
    try:
        _time_point(whole, shape, device, gate)
    finally:
        torch.set_num_threads(before)


def _time_point(
    race: Race,
    point: Point,
    device: torch.device,
    gate: TrainedGate,
    instead: Callable[[Own, Peer, int], tuple[Call, Call]] | None = None,
) -> None:
    case, model = point.case, cases.model(point.case.config, device)
    found = _contenders(model, Path(), torch.get_num_threads())
    lineup = Lineup(model, case.batch, gate)
    own = next(c for c in found if isinstance(c, Own) and lineup.add(c, parts=False))
    plain = next(c for c in found if isinstance(c, Peer) and c.name == names.EAGER_FP32)
    lineup.add(plain, parts=False)
    kept = [own.name, plain.name]
    calls = {name: call for name, call in lineup.calls.items() if name in kept}
    if instead is not None:
        calls = dict(zip(kept, instead(own, plain, case.batch), strict=True))
    race = replace(race, seconds_each=_SCALING_SECONDS)
    race(
        f"{names.OPERATION} by {point.axis}",
        point,
        calls,
        None,
        cases.work(case, own.precision if own.precision == "fp32" else "bf16"),
        fields={name: {**lineup.fields[name], "at": point.value} for name in kept},
    )


@functools.lru_cache(maxsize=1)
def _contenders(model: Model, folder: Path, threads: int) -> list[Own | Peer]:
    # Libraries take their number of threads when they are made, hence the argument.
    return [*owns(model), *peers(model, folder)]
