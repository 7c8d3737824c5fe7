"""Whole calls of `generate`, text in to text out, beside other libraries around the same network.

Answers are compared with those of eager fp32 on the same noise before anything is timed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.generate import cases
from benchmarks.generate import targets as names
from benchmarks.generate.cases import Case
from benchmarks.generate.lineup import Lineup
from benchmarks.generate.ours import Own, owns
from benchmarks.generate.peers import Peer, peers
from benchmarks.generate.trained import TrainedGate
from benchmarks.harness.race import Race


@pytest.mark.shapes(cases.CASES)
def test_generate(
    whole: Race, shape: Case, device: torch.device, folder: Path, gate: TrainedGate, full: bool
) -> None:
    """Every backend and peer: the call, its network alone, and the parts around the network."""
    if shape.full and not full:
        pytest.skip("takes a minute and a half on a CPU; give --full")
    model = cases.model(shape.config, device)
    lineup = Lineup(model, shape.batch, gate)
    contenders: list[Own | Peer] = [*owns(model), *peers(model, folder)]
    for contender in contenders:
        # On a CPU a peer's network in batches says nothing new, slowly.
        lineup.add(
            contender, device.type == "cuda" or shape.batch == 1 or isinstance(contender, Own)
        )
    lineup.add_phases()
    precision = "fp32" if device.type == "cpu" else "bf16"
    work = cases.work(shape, precision)
    whole(names.OPERATION, shape, lineup.calls, None, work, fields=lineup.fields)
