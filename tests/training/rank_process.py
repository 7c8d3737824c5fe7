"""Ranks of the tests of several ranks, forked from one process that has imported everything.

A line of JSON on stdin asks for a scenario, the variables of each rank and where its stderr goes; a
line on stdout gives their exit codes, which are those that the training command would end with.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from tiny_training import tiny_config

from dlmone_fast.cli import run_command
from dlmone_fast.config import Config, merge
from dlmone_fast.training import run
from dlmone_fast.training.stage import Stage
from dlmone_fast.training.teacher_phase import TeacherPhase


def is_second() -> bool:
    """Whether this is the rank that something happens to."""
    return os.environ.get("RANK") == "1"


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
        if step == 2 and is_second():
            found["loss"] = found["loss"] * float("nan")
        return found

    def broken_losses(self: Any, step: int, slots: Any) -> Any:
        dsm, adversarial = losses(self, step, slots)
        return (dsm * float("inf") if step == 2 and is_second() else dsm), adversarial

    TeacherPhase.terms = broken_terms  # type: ignore[method-assign]
    Stage._score_losses = broken_losses  # type: ignore[method-assign]
    run(config(folder))


def at_step(action: Any) -> None:
    """Have the second rank do something in step 3 of the teacher."""
    update = TeacherPhase.update

    def acting(self: Any, step: int) -> dict[str, float]:
        if step == 3 and is_second():
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


def rank(scenario: str, folder: str, variables: dict[str, str], log: str) -> None:
    """What a forked process does; it does not return."""
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        os.environ.update(variables)
        torch.set_num_threads(1)

        def main() -> int:
            globals()[scenario](Path(folder))
            return 0

        run_command(main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Fork what is asked for, until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for variables, log in zip(request["variables"], request["logs"], strict=True):
            child = os.fork()
            if child == 0:
                rank(request["scenario"], request["folder"], variables, log)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    serve()
