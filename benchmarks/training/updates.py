"""One training step by several implementations, each with networks and optimisers of its own.

All run the package's own `TeacherPhase` and `Stage` on the same rows, draws and weights. Before
anything is timed, the first update of each must have the losses and the gradient norm of eager
PyTorch in fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.harness.race import COMPILED, EAGER, OURS
from benchmarks.training.cases import GENERATOR, SCORE, TEACHER, Case, Update, workspace
from dlmone_fast.diffusion import Schedule
from dlmone_fast.kernels import dispatch
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.training.loop import phase_seed
from dlmone_fast.training.optim import UpdateGuard
from dlmone_fast.training.stage import Stage
from dlmone_fast.training.teacher_phase import TeacherPhase, new_network
from dlmone_fast.training.workspace import Workspace

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative difference of a loss or gradient norm. fp32: sums in another order, and noise
whose last bits are another library's logarithm and cosine. bf16 keeps eight bits of every
activation, so that a single output is off by a per cent or more; losses are means of many."""

OTHER_DROPOUT = "absent: it draws other dropout than eager PyTorch, so it cannot be checked"
LONG_TO_COMPILE = "absent: compiling takes longer than all else; timed here with --full"

# Of the numbers that are added to ψ's weights: those of BERT's initialisation.
_DISTANCE = 0.02
# Longer updates are not repeated to see how long they take: the checked one says it.
_LONG_SECONDS = 0.5


@dataclass(frozen=True)
class Contender:
    """An implementation: the kernels' backend, and whether networks are compiled."""

    name: str
    backend: str
    compiled: bool = False

    @property
    def own(self) -> bool:
        return self.name.startswith(OURS)


OURS_EAGER = Contender(OURS, dispatch.AUTO)
OURS_COMPILED = Contender(f"{OURS} compiled", dispatch.AUTO, compiled=True)
PLAIN = Contender(EAGER, "torch")
PLAIN_COMPILED = Contender(COMPILED, "torch", compiled=True)


def contenders(device: torch.device) -> list[Contender]:
    """Ours first, as "auto" trains; compiled networks are a choice of the user's."""
    compiled = [OURS_COMPILED] if device.type == "cuda" else []
    return [OURS_EAGER, *compiled, PLAIN, PLAIN_COMPILED]


class Stepper:
    """One implementation's run of one step; every call is its next update."""

    def __init__(
        self, contender: Contender, update: Callable[[int], dict[str, float]], guard: UpdateGuard
    ) -> None:
        self.contender, self.guard = contender, guard
        self._update, self._next = update, 0

    def __call__(self) -> dict[str, float]:
        """The update's losses and gradient norm."""
        with dispatch.force_backend(self.contender.backend):
            values = self._update(self._next)
        self._next += 1
        return values


def stepper(update: Update, contender: Contender, device: torch.device, folder: Path) -> Stepper:
    """A fresh start: the same for every implementation, down to the bits of the weights."""
    opened = workspace(update.case, device, contender.compiled, folder)
    with dispatch.force_backend(contender.backend):
        if update.step == TEACHER:
            phase = TeacherPhase(opened, {})
            return Stepper(contender, phase.update, phase.guard)
        stage = new_stage(opened)
    of_steps = stage.config.steps
    run = {
        SCORE: lambda step: stage.update_score(step, of_steps),
        GENERATOR: lambda step: stage.update_generator(step, of_steps, diagnose=False),
    }[update.step]
    return Stepper(contender, run, stage.guard)


def new_stage(opened: Workspace) -> Stage:
    """Stage 1 of random networks, ψ some way from φ."""
    config = opened.config
    lm = new_network(opened)
    teacher = Denoiser(lm, Schedule(config.diffusion)).eval().requires_grad_(False)
    seed = phase_seed(config.seed, 1)
    stage = Stage(opened, config.distill.stage1, teacher, lm.backbone, seed)
    _move(stage.score, config.seed)
    return stage


@torch.no_grad()
def _move(score: nn.Module, seed: int) -> None:
    """Take ψ away from φ, where it starts: there the SiD loss is 0, and the head's logits are."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in score.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(_DISTANCE * noise.to(parameter.device))


@dataclass
class Lineup:
    """The implementations of an update whose first one was right, and the fields of all.

    Attributes:
        calls: what to time, by name, ours first.
        fields: further fields of the rows, by name.
        expected: seconds of the checked update, where it was a long one.
    """

    update: Update
    device: torch.device
    folder: Path
    calls: dict[str, Stepper] = field(default_factory=dict)
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)

    def add_all(self, found: list[Contender], compile_too: bool) -> None:
        """Check implementations against eager PyTorch and take in those that are right."""
        plain = self._start(PLAIN)
        began = time.perf_counter()
        values = plain()
        seconds = time.perf_counter() - began
        exact = values if self._exact_case == self.update.case else self._exact_values()
        for contender in found:
            absent = self._absent(contender, compile_too)
            if absent:
                self.fields[contender.name] = {"note": absent}
            elif contender == PLAIN:
                self._take(plain, values, exact, seconds)
            else:
                self._add(contender, exact)

    @property
    def _exact_case(self) -> Case:
        # Dropout's draws differ between precisions, so that fp32 is no measure of bf16's.
        case = self.update.case
        return case if case.dropout else replace(case, precision="fp32")

    def _exact_values(self) -> dict[str, float]:
        update = replace(self.update, case=self._exact_case)
        return stepper(update, PLAIN, self.device, self.folder)()

    def _absent(self, contender: Contender, compile_too: bool) -> str:
        if not contender.compiled:
            return ""
        if self.update.case.dropout:
            return OTHER_DROPOUT
        return "" if compile_too else LONG_TO_COMPILE

    def _start(self, contender: Contender) -> Stepper:
        return stepper(self.update, contender, self.device, self.folder)

    def _add(self, contender: Contender, exact: Mapping[str, float]) -> None:
        try:
            built = self._start(contender)
            began = time.perf_counter()
            values = built()
            seconds = time.perf_counter() - began
        except Exception as error:
            if contender.own:
                raise
            first = (str(error).strip().splitlines() or [""])[0]
            note = f"failed: {type(error).__name__}: {first}"
            self.fields[contender.name] = {"note": note[:160]}
            return
        self._take(built, values, exact, seconds)

    def _take(
        self,
        built: Stepper,
        values: Mapping[str, float],
        exact: Mapping[str, float],
        seconds: float,
    ) -> None:
        contender = built.contender
        wrong = disagreement(values, exact, TOLERANCE[self.update.case.precision])
        if wrong:
            if contender.own:
                pytest.fail(f"{contender.name}, {self.update}: {wrong}")
            self.fields[contender.name] = {"note": f"wrong, so not timed: {wrong}"}
            return
        self.calls[contender.name] = built
        self.fields[contender.name] = {"at": self.update.case.batch}
        if seconds > _LONG_SECONDS and not contender.compiled:
            self.expected[contender.name] = seconds

    def check_guards(self) -> None:
        """Fail if an update was skipped for what was not finite: its time is not an update's."""
        for name, built in self.calls.items():
            if built.guard.skipped:
                pytest.fail(
                    f"{name}, {self.update}: {built.guard.skipped} of its updates were skipped, "
                    "loss or gradient were not finite"
                )


def disagreement(found: Mapping[str, float], exact: Mapping[str, float], tolerance: float) -> str:
    """The loss or norm that differs by more than `tolerance` of the exact one; "": none does."""
    if found.keys() != exact.keys():
        return f"it reports {', '.join(found)}, not {', '.join(exact)}"
    for name, value in exact.items():
        # Also refuses what is not a number.
        if not abs(found[name] - value) <= tolerance * abs(value):
            return f"{name} is {found[name]:.7g}, not {value:.7g}"
    return ""
