"""The loop that every phase runs in: resume, update, log, validate, save, go back, stop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dlmone_fast.config import to_toml
from dlmone_fast.errors import CheckpointError, DivergedError, InterruptedAndSavedError
from dlmone_fast.kernels.noise import Stream, random_bits
from dlmone_fast.models.checkpoint import (
    Checkpoint,
    load_checkpoint,
    resolve_resume,
    save_checkpoint,
)
from dlmone_fast.models.tensors import finite_problems
from dlmone_fast.training.cuts import cuts_of_run
from dlmone_fast.training.progress import Progress
from dlmone_fast.training.signals import StopRequest
from dlmone_fast.training.workspace import Workspace, check_inputs

State = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]


class Phase(Protocol):
    """One phase of training, as the loop sees it. An update is a pure function of its step."""

    name: str
    steps: int
    save_every: int
    validate_every: int
    batch_size: int
    inputs: dict[str, str]
    """Hashes of what the phase reads; a checkpoint of other inputs is refused."""

    def update(self, step: int) -> dict[str, float]:
        """Make update `step` (from 0) and return what to log."""

    def validate(self, step: int, progress: Progress) -> None:
        """Measure the model after `step` updates and record it."""

    def state(self) -> State:
        """Tensors and JSON from which `restore` continues exactly."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""


def run_phase(phase: Phase, workspace: Workspace, resume: str | os.PathLike[str] = "auto") -> None:
    """Train one phase to its end, from its newest checkpoint if there is one.

    Raises:
        InterruptedAndSavedError: SIGTERM came or the run's time is up; a checkpoint was saved
            first.
        DivergedError: too many steps in a row were not finite, twice from the same checkpoint.
        CheckpointError: a checkpoint cannot be read, or the run folder not written.
    """
    root = workspace.checkpoints(phase.name)
    ranks = workspace.ranks
    # One rank verifies the files; each reads them.
    found = resolve_resume(root, resume) if ranks.writes else None
    found = ranks.shared_path(found)
    checkpoint = load_checkpoint(found) if found else None
    start = checkpoint.step if checkpoint else 0
    config, device = workspace.config, workspace.device
    progress = Progress(
        workspace.root, phase.name, start, phase.steps, config.log_every, ranks.writes
    )
    try:
        if found:
            progress.say(f"{phase.name}: resumed from {found}")
        if ranks.writes:
            _tell_cuts(workspace, progress, start)
        # Dropout draws from torch's global generators, which are the caller's.
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            # One rank alone must not leave what all do together.
            StopRequest(cuts=ranks.size == 1) as stop,
        ):
            _Loop(phase, workspace, progress, stop).run(checkpoint)
    finally:
        progress.close()


def _tell_cuts(workspace: Workspace, progress: Progress, start: int) -> None:
    """Say and record how many texts of each split lose tokens."""
    cuts = cuts_of_run(workspace)
    for cut in cuts:
        if cut.cut:
            progress.say(cut.sentence())
    # Once: what is resumed has it already.
    if start == 0:
        progress.record(start, {"cuts": [cut.numbers() for cut in cuts]})


class _Loop:
    """The steps of one phase, from a checkpoint or from the first one."""

    def __init__(
        self, phase: Phase, workspace: Workspace, progress: Progress, stop: StopRequest
    ) -> None:
        self.phase, self.workspace, self.progress, self.stop = phase, workspace, progress, stop
        self.last: Path | None = None
        """The newest checkpoint of this past, and the one that was gone back to last."""
        self.gone_back_to: Path | None = None

    def run(self, checkpoint: Checkpoint | None) -> None:
        step = self._restore(checkpoint) if checkpoint else 0
        if checkpoint is None:
            with self.stop.cutting():
                self.phase.validate(0, self.progress)
        while step < self.phase.steps:
            try:
                self._make(step)
                step += 1
            except DivergedError as error:
                step = self._go_back(step, error)

    def _make(self, step: int) -> None:
        """One step, and what is due after it."""
        phase, workspace = self.phase, self.workspace
        values = phase.update(step)
        self.progress.advance(step, phase.batch_size, values)
        done, last = step + 1, step + 1 == phase.steps
        due = done % phase.validate_every == 0 or last
        validated = not due or self._validated(done)
        # Asked once: what is not saved must not be called so.
        time_is_up, terminated = workspace.ranks.any(workspace.limit.reached(), self.stop.requested)
        stopping = time_is_up or terminated
        if done % phase.save_every == 0 or last or stopping:
            self._save(done, validated)
        # After the last step too: the next phase must not start. A restart finds it done.
        if stopping:
            cause = "SIGTERM" if terminated else workspace.limit
            raise InterruptedAndSavedError(
                f"stopped by {cause} after {done} of {phase.steps} steps of {phase.name}; "
                "saved; the same command continues"
            )

    def _validated(self, step: int) -> bool:
        """Whether a validation came to its end: SIGTERM does not wait for it."""
        try:
            with self.stop.cutting():
                self.phase.validate(step, self.progress)
        except InterruptedAndSavedError:
            return False
        return True

    def _save(self, step: int, validated: bool) -> None:
        phase, workspace = self.phase, self.workspace
        tensors, state = phase.state()
        root = workspace.checkpoints(phase.name)
        for name, group in tensors.items():
            if problems := finite_problems(group):
                raise DivergedError(f"{phase.name}, step {step}, {name}: {problems[0]}")
        state |= {"phase": phase.name, "inputs": phase.inputs, "validated": validated}
        saved = None
        if workspace.ranks.writes:
            saved = save_checkpoint(
                root, step, tensors, state, to_toml(workspace.config), require_finite=False
            )
        self.last = workspace.ranks.shared_path(saved)

    def _go_back(self, step: int, error: DivergedError) -> int:
        """Restore the last checkpoint once: a fault of the machine is not met again."""
        if self.last is None or self.last == self.gone_back_to:
            again = "" if self.last is None else f", again after going back to {self.last}"
            raise DivergedError(
                f"{error}{again}; what was saved before is intact. Lower the learning rate or "
                "set a gradient clip, then run again"
            ) from error
        self.gone_back_to = self.last
        checkpoint = load_checkpoint(self.last)
        self.progress.go_back(step, checkpoint.step)
        self.progress.say(f"{self.phase.name}: {error}; back to {self.last}")
        return self._restore(checkpoint)

    def _restore(self, checkpoint: Checkpoint) -> int:
        phase, state = self.phase, checkpoint.state
        found = state.get("phase")
        if found != phase.name:
            raise CheckpointError(
                f"{checkpoint.path}: is a checkpoint of phase {found!r}, expected "
                f"{phase.name!r}; pass --phase {found}, or a checkpoint of {phase.name}"
            )
        check_inputs(checkpoint.path, state.get("inputs"), phase.inputs)
        phase.restore(checkpoint)
        self.last = checkpoint.path
        if not state.get("validated", True):
            with self.stop.cutting():
                phase.validate(checkpoint.step, self.progress)
        return checkpoint.step


def reseed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Make dropout of a micro-batch a pure function of (seed, step, micro-batch)."""
    torch.manual_seed(int(random_bits(seed, Stream.DROPOUT, micro_batch, step, 0)))


def phase_seed(seed: int, index: int) -> int:
    """Seed of the index-th phase of a run: phases draw independent data orders and noise."""
    # Multiples of an odd constant near 2^64 / golden ratio: distinct for every small index.
    return (seed + index * 0x9E3779B97F4A7C15) % (1 << 64)
