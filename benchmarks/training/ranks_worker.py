"""One process of `python -m benchmarks.ranks`: times updates and counts what they send.

`torchrun --nproc-per-node N -m benchmarks.training.ranks_worker FOLDER ROWS UPDATES` writes
FOLDER/N-ROWS.json: of each step the seconds of every timed update, and the bytes that a process
hands to collectives in one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.training.cases import GENERATOR, SCORE, TEACHER, Case, recipe, workspace
from benchmarks.training.updates import new_stage
from dlmone_fast.training.ranks import Ranks, open_ranks
from dlmone_fast.training.teacher_phase import TeacherPhase

MODEL = "compact"
_WARM_UP = 2


class Traffic:
    """Bytes of the tensors that this process gives to sums and gathers."""

    def __init__(self) -> None:
        self.bytes, self.calls = 0, 0
        for name in ("all_reduce", "all_gather"):
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            # The last tensor is this process's own: all_gather's first argument is what it fills.
            own = next(a for a in reversed(arguments) if isinstance(a, torch.Tensor))
            self.bytes += own.numel() * own.element_size()
            self.calls += 1
            return collective(*arguments, **options)

        return call


def main() -> None:
    folder, rows, updates = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    traffic = Traffic()
    with open_ranks("cpu", minutes=5.0) as ranks:
        found = {
            name: _measured(update, ranks, traffic, updates)
            for name, update in _updates(folder, rows, ranks).items()
        }
        if ranks.writes:
            path = folder / f"{ranks.size}-{rows}.json"
            path.write_text(json.dumps(found), encoding="utf-8")


def _updates(folder: Path, rows: int, ranks: Ranks) -> dict[str, Callable[[int], object]]:
    case = Case(MODEL, recipe(MODEL), rows)
    opened = workspace(case, torch.device("cpu"), False, folder / f"{ranks.size}", ranks)
    teacher, stage = TeacherPhase(opened, {}), new_stage(opened)
    steps = stage.config.steps
    return {
        TEACHER: teacher.update,
        SCORE: lambda step: stage.update_score(step, steps),
        GENERATOR: lambda step: stage.update_generator(step, steps, diagnose=False),
    }


def _measured(
    update: Callable[[int], object], ranks: Ranks, traffic: Traffic, updates: int
) -> dict[str, Any]:
    for step in range(_WARM_UP):
        update(step)
    ranks.wait()
    bytes_before, calls_before, seconds = traffic.bytes, traffic.calls, []
    for step in range(_WARM_UP, _WARM_UP + updates):
        began = time.perf_counter()
        update(step)
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": seconds,
        "bytes": (traffic.bytes - bytes_before) / updates,
        "calls": (traffic.calls - calls_before) / updates,
    }


if __name__ == "__main__":
    main()
