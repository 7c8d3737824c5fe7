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

    Minutes are those of updates, validation and checkpoints; what a slice takes to start is not in
    them. Updates that were repeated after a resume count once, their rows and minutes twice.
    """
    found: dict[str, PhaseCost] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = _parsed(line)
        if "seconds" not in record:
            continue
        phase = record["phase"]
        cost = found.get(phase, PhaseCost(phase, 0, 0, 0.0))
        found[phase] = PhaseCost(
            phase,
            max(cost.updates, record["step"]),
            cost.samples + record["rows"],
            cost.minutes + record["seconds"] / 60,
        )
    return list(found.values())


def slices(run: Path) -> list[dict[str, Any]]:
    """Device and minutes of each process that worked on the run, itself not included."""
    file = run / "slices.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [found for found in map(_parsed, lines) if found]


def _parsed(line: str) -> dict[str, Any]:
    # A process that was killed may have left half a line.
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return record
