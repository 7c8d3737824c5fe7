"""One rank of the tests of several ranks: rank_process.py SCENARIO FOLDER, in torchrun's variables.

Its exit code is the one that the training command would end with.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_training import tiny_config

from dlmone_fast.cli import run_command
from dlmone_fast.config import Config, merge
from dlmone_fast.training import run
from dlmone_fast.training.stage import Stage
from dlmone_fast.training.teacher_phase import TeacherPhase

RANK = int(os.environ.get("RANK", "0"))


def config(folder: Path, **changes: Any) -> Config:
    """A run that a sum over ranks must not change: no dropout, and everything else is on."""
    stage = {"micro_batch_size": 3, "anchor_steps": 1, "anchor_weight": 0.1}
    stage |= {"anchor_decay_steps": 2, "few_steps": 2}
    options = {
        "model": {"dropout": 0.0},
        "teacher": {"micro_batch_size": 3},
        "distill": {
            "pairs": {"count": 19, "batch_size": 7, "steps": 2},
            "stage1": stage,
            "stage2": {"micro_batch_size": 3},
        },
        "rank_minutes": 0.5,
    }
    return tiny_config(folder, **merge(options, changes))


def whole(folder: Path) -> None:
    """All phases."""
    run(config(folder))


def not_finite(folder: Path) -> None:
    """In one step of teacher and stage 1 the losses of the second rank are not finite."""
    terms, losses = TeacherPhase.terms, Stage._score_losses

    def broken_terms(self: Any, rows: Any, t: Any, step: int, slots: Any) -> Any:
        found = terms(self, rows, t, step, slots)
        if step == 2 and RANK == 1:
            found["loss"] = found["loss"] * float("nan")
        return found

    def broken_losses(self: Any, step: int, slots: Any) -> Any:
        dsm, adversarial = losses(self, step, slots)
        return (dsm * float("inf") if step == 2 and RANK == 1 else dsm), adversarial

    TeacherPhase.terms = broken_terms  # type: ignore[method-assign]
    Stage._score_losses = broken_losses  # type: ignore[method-assign]
    run(config(folder))


def at_step(action: Any) -> None:
    """Have the second rank do something in step 3 of the teacher."""
    update = TeacherPhase.update

    def acting(self: Any, step: int) -> dict[str, float]:
        if step == 3 and RANK == 1:
            action()
        return update(self, step)

    TeacherPhase.update = acting  # type: ignore[method-assign]


def killed(folder: Path) -> None:
    """The second rank is killed in a step."""
    at_step(lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(config(folder))


def terminated(folder: Path) -> None:
    """The second rank alone gets SIGTERM."""
    at_step(lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(config(folder))


def small_batch(folder: Path) -> None:
    """A batch of one row for two ranks."""
    run(config(folder, teacher={"batch_size": 1}))


def main() -> int:
    torch.set_num_threads(1)
    scenario, folder = sys.argv[1:]
    globals()[scenario](Path(folder))
    return 0


if __name__ == "__main__":
    run_command(main)
