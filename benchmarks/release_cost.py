"""What a run has cost, phase by phase, from its own log."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PhaseCost:
    """Updates, rows and minutes of one phase, over all slices that it was trained in."""

    phase: str
    updates: int
    samples: int
    minutes: float


def phase_costs(run: Path) -> list[PhaseCost]:
    """The costs of the phases that `run`/metrics.jsonl tells of, in the order of their first lines.

    Minutes are those of updates, validation and checkpoints up to the last logged step of each
    slice; what a slice takes to start is not in them. Updates that were repeated after a resume
    count once, their rows and minutes twice.
    """
    found: dict[str, PhaseCost] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record: dict[str, Any] = json.loads(line)
        if "samples_per_second" not in record:
            continue
        phase, rows = record["phase"], record["samples"]
        cost = found.get(phase, PhaseCost(phase, 0, 0, 0.0))
        found[phase] = PhaseCost(
            phase,
            max(cost.updates, record["step"]),
            cost.samples + rows,
            cost.minutes + rows / record["samples_per_second"] / 60,
        )
    return list(found.values())
