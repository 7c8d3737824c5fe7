"""The loop that every phase runs in: resume, update, log, validate, save, stop."""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from torch import Tensor

from dlmone_fast.config import to_toml
from dlmone_fast.errors import CheckpointError, InterruptedAndSavedError
from dlmone_fast.kernels.noise import Stream, random_bits
from dlmone_fast.models.checkpoint import (
    Checkpoint,
    load_checkpoint,
    resolve_resume,
    save_checkpoint,
)
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
        DivergedError: too many steps in a row were not finite.
        CheckpointError: a checkpoint cannot be read, or the run folder not written.
    """
    root = workspace.checkpoints(phase.name)
    ranks = workspace.ranks
    # One rank verifies the files; each reads them.
    found = ranks.gather(resolve_resume(root, resume) if ranks.writes else None)[0]
    start = _restore(phase, load_checkpoint(found)) if found else 0
    config = workspace.config
    progress = Progress(
        workspace.root, phase.name, start, phase.steps, config.log_every, ranks.writes
    )
    device = workspace.device
    try:
        if found:
            progress.say(f"{phase.name}: resumed from {found}")
        # Dropout draws from torch's global generators, which are the caller's.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            _loop(phase, workspace, start, progress)
    finally:
        progress.close()


def _loop(phase: Phase, workspace: Workspace, start: int, progress: Progress) -> None:
    if start == 0:
        phase.validate(0, progress)
    with StopRequest() as stop:
        for step in range(start, phase.steps):
            values = phase.update(step)
            progress.advance(step, phase.batch_size, values)
            done = step + 1
            if done % phase.validate_every == 0 or done == phase.steps:
                phase.validate(done, progress)
            # Asked once: what is not saved must not be called so.
            time_is_up, terminated = workspace.ranks.any(workspace.limit.reached(), stop.requested)
            stopping = time_is_up or terminated
            if done % phase.save_every == 0 or done == phase.steps or stopping:
                _save(phase, workspace, done)
            # After the last step too: the next phase must not start. A restart finds it done.
            if stopping:
                cause = "SIGTERM" if terminated else workspace.limit
                raise InterruptedAndSavedError(
                    f"stopped by {cause} after {done} of {phase.steps} steps of {phase.name}; "
                    "saved; the same command continues"
                )


def _save(phase: Phase, workspace: Workspace, step: int) -> None:
    if workspace.ranks.writes:
        tensors, state = phase.state()
        state |= {"phase": phase.name, "inputs": phase.inputs}
        root = workspace.checkpoints(phase.name)
        save_checkpoint(root, step, tensors, state, to_toml(workspace.config))
    workspace.ranks.wait()


def _restore(phase: Phase, checkpoint: Checkpoint) -> int:
    found = checkpoint.state.get("phase")
    if found != phase.name:
        raise CheckpointError(
            f"{checkpoint.path}: is a checkpoint of phase {found!r}, expected {phase.name!r}; "
            f"pass --phase {found}, or a checkpoint of {phase.name}"
        )
    check_inputs(checkpoint.path, checkpoint.state.get("inputs"), phase.inputs)
    phase.restore(checkpoint)
    return checkpoint.step


def reseed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Make dropout of a micro-batch a pure function of (seed, step, micro-batch)."""
    torch.manual_seed(int(random_bits(seed, Stream.DROPOUT, micro_batch, step, 0)))


def phase_seed(seed: int, index: int) -> int:
    """Seed of the index-th phase of a run: phases draw independent data orders and noise."""
    # Multiples of an odd constant near 2^64 / golden ratio: distinct for every small index.
    return (seed + index * 0x9E3779B97F4A7C15) % (1 << 64)
