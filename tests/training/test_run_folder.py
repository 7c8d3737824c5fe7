"""A run continues only with the data and the teacher that it was started with."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from dlmone_fast.errors import ConfigError
from dlmone_fast.training import RunResult, run


@pytest.fixture
def copied(finished: RunResult, tmp_path: Path) -> RunResult:
    """A copy of the finished run that may be changed."""
    root = tmp_path / "run"
    shutil.copytree(finished.root, root)
    config = dataclasses.replace(finished.workspace.config, output_dir=str(root))
    workspace = dataclasses.replace(
        finished.workspace, config=config, root=root, data_dir=root / "data"
    )
    return RunResult(root, workspace, root / "teacher", root / "stage2")


def test_a_finished_phase_of_other_data_is_not_taken_for_this_one(copied: RunResult) -> None:
    rows = copied.root / "data" / "train.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"teacher: was made from another train than"):
        run(copied.workspace.config)


def test_a_checkpoint_of_other_data_is_refused(copied: RunResult) -> None:
    shutil.rmtree(copied.root / "teacher")
    rows = copied.root / "data" / "valid.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"step-\d+: was made from another valid than"):
        run(copied.workspace.config, "teacher")


def test_a_student_of_another_teacher_is_not_taken_for_this_ones(copied: RunResult) -> None:
    other = copied.root.parent / "other"
    again = dataclasses.replace(copied.workspace.config, seed=99, output_dir=str(other))
    teacher = run(again, "teacher").teacher
    assert teacher is not None
    with pytest.raises(ConfigError, match="stage1: was made from another teacher"):
        run(copied.workspace.config, "stage1", teacher=teacher)
