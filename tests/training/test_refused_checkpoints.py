"""A checkpoint that its manifest vouches for, and that does not fit the run, is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resealing import edit_json, edit_tensors
from torch import Tensor

from dlmone_fast.config import Config
from dlmone_fast.errors import CheckpointError
from dlmone_fast.models.checkpoint import find_latest, load_checkpoint
from dlmone_fast.models.denoiser import denoiser_from_folder
from dlmone_fast.models.folder import load_folder
from dlmone_fast.training import RunResult
from dlmone_fast.training.distill_phase import DistillPhase
from dlmone_fast.training.loop import Phase
from dlmone_fast.training.teacher_phase import TeacherPhase

Make = Callable[..., Config]
Change = Callable[[dict[str, Any]], Any]


def phase_of(finished: RunResult, name: str) -> Phase:
    """A phase of the finished run as it is before its first step."""
    workspace = finished.workspace
    if name == "teacher":
        return TeacherPhase(workspace, {})
    teacher, start = (denoiser_from_folder(load_folder(workspace.model("teacher"))) for _ in "12")
    return DistillPhase(workspace, 1, teacher, start.lm.backbone, {})


def copied(finished: RunResult, name: str, folder: Path) -> Path:
    newest, _ = find_latest(finished.workspace.checkpoints(name))
    assert newest is not None
    return Path(shutil.copytree(newest, folder / newest.name))


def first(values: dict[str, Tensor]) -> str:
    return min(values)


def drop(values: dict[str, Tensor]) -> None:
    del values[first(values)]


def add(values: dict[str, Tensor]) -> None:
    values["more"] = torch.zeros(2)


def reshape(values: dict[str, Tensor]) -> None:
    values[first(values)] = values[first(values)].repeat(2)


def retype(values: dict[str, Tensor]) -> None:
    values[first(values)] = values[first(values)].to(torch.float16)


GROUPS = {
    "teacher": ("model", "ema", "optimizer", "timesteps"),
    "stage1": (
        "generator", "score", "ema", "best", "generator_optimizer", "score_optimizer", "accuracy",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "1 tensor missing: "),
        (add, "1 tensor unexpected: more"),
        (reshape, r"of another shape or dtype: |is \[\d+\] .*, expected \["),
        (retype, r"float16"),
    ],
)
@pytest.mark.parametrize("phase", GROUPS)
def test_tensors_that_do_not_fit_are_named(
    finished: RunResult, tmp_path: Path, phase: str, change: Change, message: str
) -> None:
    live = phase_of(finished, phase)
    for group in GROUPS[phase]:
        path = copied(finished, phase, tmp_path / group)
        edit_tensors(path / f"{group}.safetensors", change)
        with pytest.raises(CheckpointError, match=message) as caught:
            live.restore(load_checkpoint(path))
        assert str(path / f"{group}.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("phase", "key", "value"),
    [
        ("teacher", "skipped", None),
        ("teacher", "skipped", "many"),
        ("teacher", "optimizer", []),
        ("teacher", "skipped", -1),
        ("teacher", "skipped", 10**12),
        ("teacher", "bad_in_a_row", 3),
        ("teacher", "bad_in_a_row", {"teacher": -1}),
        ("teacher", "bad_in_a_row", {"skipped": 0, "teacher": 10**400}),
        ("stage1", "bad_in_a_row", {"generator": "3"}),
        ("stage1", "bad_in_a_row", {"generator": True}),
        ("stage1", "bad_in_a_row", {"score estimator": 1.5}),
        ("stage1", "best_of", None),
        ("stage1", "best_score", "high"),
        ("stage1", "score_optimizer", None),
    ],
)
def test_a_state_that_does_not_fit_is_named(
    finished: RunResult, tmp_path: Path, phase: str, key: str, value: Any
) -> None:
    path = copied(finished, phase, tmp_path)

    def change(head: dict[str, Any]) -> None:
        if value is None:
            del head["state"][key]
        else:
            head["state"][key] = value

    edit_json(path / "state.json", change)
    with pytest.raises(CheckpointError, match=rf"state\.json: {key} must be .*, got "):
        phase_of(finished, phase).restore(load_checkpoint(path))


@pytest.mark.parametrize("phase", GROUPS)
def test_a_step_behind_the_end_is_named(finished: RunResult, tmp_path: Path, phase: str) -> None:
    live = phase_of(finished, phase)
    path = copied(finished, phase, tmp_path).rename(tmp_path / "kept")
    edit_json(path / "state.json", lambda head: head.update(step=live.steps + 1))
    with pytest.raises(CheckpointError, match=rf"state\.json: step is {live.steps + 1}, the phase"):
        live.restore(load_checkpoint(path))


@pytest.mark.parametrize("phase", GROUPS)
def test_a_file_that_is_not_listed_is_missed(
    finished: RunResult, tmp_path: Path, phase: str
) -> None:
    live = phase_of(finished, phase)
    for group in GROUPS[phase]:
        path = copied(finished, phase, tmp_path / group)
        edit_json(path / "state.json", lambda head, group=group: head["tensors"].remove(group))
        with pytest.raises(CheckpointError, match=r"tensors? missing: "):
            live.restore(load_checkpoint(path))
