"""What test_signals has a training command do: stay at one place, and tell that it is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlmone_fast import comparison
from dlmone_fast.training import loop, pipeline
from dlmone_fast.training.distill_phase import DistillPhase
from dlmone_fast.training.pairs_phase import PairsPhase
from dlmone_fast.training.teacher_phase import TeacherPhase

REACHED = "reached"


def stay(place: str, phase: str, step: int, seconds: float) -> None:
    """Stay for some seconds in this phase at its first "update", "validate" or "save" from a step
    on; or, whatever the phase, in "data", "publish" or "compare"."""
    if place in _AROUND:
        module, name = _AROUND[place]
        setattr(module, name, _staying(getattr(module, name), lambda *_: True, seconds))
    elif place == "save":
        here = _of_checkpoints(phase, step)
        loop.save_checkpoint = _staying(loop.save_checkpoint, here, seconds)  # type: ignore[assignment]
    else:
        kind: Any = {"teacher": TeacherPhase, "pairs": PairsPhase}.get(phase, DistillPhase)
        setattr(kind, place, _staying(getattr(kind, place), _of_phase(phase, step), seconds))


_AROUND: dict[str, tuple[Any, str]] = {
    "data": (pipeline, "open_workspace"),
    "publish": (pipeline, "publish"),
    "compare": (comparison, "compare_run"),
}


def _of_phase(name: str, step: int) -> Callable[..., bool]:
    return lambda phase, at, *_: phase.name == name and at >= step


def _of_checkpoints(name: str, step: int) -> Callable[..., bool]:
    return lambda root, at, *_: root.name == name and at >= step


def _staying(original: Any, here: Callable[..., bool], seconds: float) -> Any:
    def staying(*arguments: Any, **options: Any) -> Any:
        if here(*arguments) and not Path(REACHED).exists():
            Path(REACHED).touch()
            # Not one sleep: whoever interrupts it must also leave.
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.01)
        return original(*arguments, **options)

    return staying
