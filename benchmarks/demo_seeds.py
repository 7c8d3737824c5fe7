"""The demo over several seeds, checked against its floors: `python -m benchmarks.demo_seeds`.

Prints one row a seed and ends with 1 if a floor is broken. The floors are those of the README:
an independent-token model has agreement 0.125, the undistilled student about 0.8.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dlmone_fast.cli import run_command
from dlmone_fast.evaluation.table import Table

SEEDS = (1, 2, 3)
FLOORS = {"valid": 0.95, "agreement": 0.90, "both_registers": 0.90}
LARGEST_LOSS_IN_STAGE_2 = 0.03
SMALLEST_SPEED_UP = 500


def main() -> int:
    """Run the demo for each seed and check it; the exit code."""
    table = Table(["seed", "minutes", *FLOORS, "joint", "stage 1 joint", "speed-up", "broken"])
    broken = False
    for seed in SEEDS:
        folder = Path(f"runs/demo-seed-{seed}")
        started = time.perf_counter()
        _run(seed, folder)
        minutes = (time.perf_counter() - started) / 60
        rows = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["rows"]
        cells, failures = _judge(rows)
        table.add(seed, f"{minutes:.1f}", *cells, ", ".join(failures) or "nothing")
        broken |= bool(failures)
    print(table.markdown())
    return int(broken)


def _run(seed: int, folder: Path) -> None:
    command = [sys.executable, "-m", "dlmone_fast.train", "--preset", "grammar"]
    command += ["--seed", str(seed), "--output-dir", str(folder), "--resume", "never"]
    subprocess.run(command, check=True)


def _judge(rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    student = _find(rows, "student", 1)
    first = _find(rows, "student of stage 1", 1)
    slowest = next(row for row in rows if row["system"] == "teacher, ancestral")
    scores, speed_up = student["scores"], slowest["seconds"] / student["seconds"]
    failures = [name for name, floor in FLOORS.items() if scores[name] < floor]
    if first["scores"]["joint"] - scores["joint"] > LARGEST_LOSS_IN_STAGE_2:
        failures.append("stage 2")
    if speed_up < SMALLEST_SPEED_UP:
        failures.append("speed-up")
    values = [*(scores[name] for name in FLOORS), scores["joint"], first["scores"]["joint"]]
    return [*(f"{value:.3f}" for value in values), f"{speed_up:.0f}×"], failures


def _find(rows: list[dict[str, Any]], system: str, steps: int) -> dict[str, Any]:
    return next(row for row in rows if row["system"] == system and row["steps"] == steps)


if __name__ == "__main__":
    run_command(main)
