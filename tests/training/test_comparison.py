"""The table that ends a run."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest

from dlmone_fast.comparison import compare_run
from dlmone_fast.config import EvaluationConfig
from dlmone_fast.errors import CheckpointError
from dlmone_fast.training import RunResult


@pytest.fixture
def small(finished: RunResult, tmp_path: Path) -> RunResult:
    """A copy of the finished run that compares few rows and few calls."""
    root = tmp_path / "run"
    shutil.copytree(finished.root, root)
    evaluation = EvaluationConfig(
        rows=6, teacher_steps="5 3", student_steps="1 2", teacher_rows=4, candidates=2, bootstrap=20
    )
    config = dataclasses.replace(finished.workspace.config, evaluation=evaluation)
    workspace = dataclasses.replace(finished.workspace, config=config, root=root)
    return RunResult(root, workspace, root / "teacher", root / "stage2")


def test_every_system_stands_beside_copy_and_reference(small: RunResult):
    said: list[str] = []
    table = compare_run(small, said.append)
    rows = json.loads((small.root / "comparison.json").read_text())["rows"]
    assert [(row["system"], row["steps"]) for row in rows] == [
        ("teacher, ddim", 5),
        ("teacher, ddim", 3),
        ("undistilled (θ = φ)", 1),
        ("student of stage 1", 1),
        ("student", 1),
        ("student", 2),
        ("copy of the source", None),
        ("reference", None),
    ]
    reference = rows[-1]["scores"]
    assert reference["joint"] == reference["agreement"] == 1.0
    assert rows[-2]["scores"]["valid"] == 0.0
    assert all(row["seconds"] > 0 for row in rows[:-2])
    assert [row["samples"] for row in rows[:2]] == [8, 8]
    assert "fewest-step teacher" in table or "No teacher sampler" in table
    assert any("undistilled" in line for line in said)


def test_a_run_without_its_teacher_compares_the_student_alone(small: RunResult):
    table = compare_run(dataclasses.replace(small, teacher=None))
    assert "teacher, ddim" not in table
    assert "| student " in table


def test_a_table_that_cannot_be_kept_is_an_error_with_its_file(
    small: RunResult, monkeypatch: pytest.MonkeyPatch
):
    def read_only(directory: Path) -> None:
        # As a directory's fsync says it: without a file name.
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("dlmone_fast.files.fsync_directory", read_only)
    with pytest.raises(CheckpointError, match=r"comparison\.json.*Read-only"):
        compare_run(dataclasses.replace(small, teacher=None))
