"""A run is a function of its configuration, whatever interrupts it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlmone_fast.config import Config, to_toml
from dlmone_fast.errors import CheckpointError, ConfigError, InterruptedAndSavedError, UsageError
from dlmone_fast.models import checkpoint as checkpoints
from dlmone_fast.models.checkpoint import list_checkpoints, load_checkpoint
from dlmone_fast.training import RunResult, distill, run, train_teacher
from dlmone_fast.training.distill_phase import DistillPhase
from dlmone_fast.training.teacher_phase import TeacherPhase

PHASES = ("teacher", "stage1", "stage2")
Make = Callable[..., Config]
Weights = Callable[[Path], dict[str, Tensor]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]


class CrashError(Exception):
    """Something outside the program's control."""


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, how: Callable[[], Any]) -> list[str]:
    """Have `how` called once in each phase, in the update of `step`; returns where it was."""
    done: list[str] = []
    for phase_class in (TeacherPhase, DistillPhase):
        original = phase_class.update

        def update(
            self: Any, at: int, original: Callable[..., dict[str, float]] = original
        ) -> dict[str, float]:
            if at == step and self.name not in done:
                done.append(self.name)
                how()
            return original(self, at)

        monkeypatch.setattr(phase_class, "update", update)
    return done


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise CrashError


def last_state(root: Path, phase: str) -> dict[str, Tensor]:
    """Every tensor of a phase's last checkpoint: networks, averages, optimisers, the best."""
    step, path = list_checkpoints(root / "checkpoints" / phase)[-1]
    assert step == {"teacher": 7, "stage1": 6, "stage2": 5}[phase]
    tensors = load_checkpoint(path).tensors
    return {f"{group}/{name}": v for group, of in tensors.items() for name, v in of.items()}


def assert_same_runs(a: Path, b: Path, weights: Weights, same: Same) -> None:
    for phase in PHASES:
        assert same(last_state(a, phase), last_state(b, phase)), phase
        assert same(weights(a / phase), weights(b / phase)), phase


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    tiny: Make, finished: RunResult, tmp_path: Path, weights: Weights, same: Same
) -> None:
    torch.manual_seed(123)
    expected = weights(finished.root / "teacher")
    # The stages are run again from the same teacher below, in pieces.
    assert same(weights(train_teacher(tiny(tmp_path / "again"))), expected)
    assert not same(weights(train_teacher(tiny(tmp_path / "other", seed=1))), expected)


@pytest.mark.parametrize(
    ("how", "error"), [(terminate, InterruptedAndSavedError), (crash, CrashError)]
)
def test_a_run_interrupted_in_every_phase_ends_as_the_uninterrupted_one(
    tiny: Make,
    finished: RunResult,
    tmp_path: Path,
    weights: Weights,
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[[], Any],
    error: type[Exception],
) -> None:
    # Step 3 lies between checkpoints; in a stage it is the second update of θ.
    where = interrupt(monkeypatch, 3, how)
    config = tiny(tmp_path / "run")
    for phase in PHASES:
        with pytest.raises(error):
            run(config)
        assert where[-1] == phase
        newest = list_checkpoints(tmp_path / "run" / "checkpoints" / phase)[-1][0]
        # SIGTERM lets the step end and saves it; a crash leaves the last regular checkpoint.
        assert newest == (4 if how is terminate else 2)
    run(config)
    assert where == list(PHASES)
    assert_same_runs(finished.root, tmp_path / "run", weights, same)


def test_sigterm_in_the_last_step_of_a_phase_keeps_the_next_one_from_starting(
    tiny: Make,
    finished: RunResult,
    tmp_path: Path,
    weights: Weights,
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(tmp_path / "run")
    where = interrupt(monkeypatch, config.teacher.steps - 1, terminate)
    with pytest.raises(InterruptedAndSavedError, match="after 7 of 7 steps of teacher"):
        run(config)
    assert where == ["teacher"]
    assert not (tmp_path / "run" / "checkpoints" / "stage1").exists()
    assert same(weights(train_teacher(config)), weights(finished.root / "teacher"))


def test_the_command_ends_with_75_on_sigterm_and_has_saved(tiny: Make, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", teacher={"steps": 1_000_000, "save_every": 1_000_000})
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    command = [sys.executable, "-m", "dlmone_fast.train", "--phase", "teacher", "--config"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, str(file)], stdout=log, stderr=log)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not metrics.exists() or not metrics.stat().st_size:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    finally:
        process.kill()
    step, path = list_checkpoints(tmp_path / "run" / "checkpoints" / "teacher")[-1]
    assert load_checkpoint(path).step == step > 0
    assert "error: stopped by SIGTERM" in (tmp_path / "log").read_text()


def test_a_full_disk_leaves_the_previous_checkpoint_to_continue_from(
    tiny: Make,
    finished: RunResult,
    tmp_path: Path,
    weights: Weights,
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, writes = checkpoints.write_tensors, 0

    def write(path: Path, tensors: dict[str, Tensor]) -> None:
        nonlocal writes
        writes += "step-00000004" in str(path)
        if writes == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, tensors)

    monkeypatch.setattr(checkpoints, "write_tensors", write)
    config = tiny(tmp_path / "run")
    with pytest.raises(CheckpointError, match="No space left"):
        train_teacher(config)
    folder = tmp_path / "run" / "checkpoints" / "teacher"
    assert [step for step, _ in list_checkpoints(folder)] == [2]
    monkeypatch.undo()
    assert same(weights(train_teacher(config)), weights(finished.root / "teacher"))
    assert [step for step, _ in list_checkpoints(folder)] == [6, 7]


def test_finished_phases_are_not_run_again(
    finished: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 0, crash)
    again = run(finished.workspace.config)
    assert (again.teacher, again.student) == (finished.teacher, finished.student)
    assert distill(finished.workspace.config) == finished.root / "stage2"
    assert train_teacher(finished.workspace.config) == finished.root / "teacher"


def test_resume_never_starts_over(
    tiny: Make, tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "run", teacher={"steps": 3})
    first = weights(train_teacher(config))
    other = replace(config, seed=9)
    with pytest.raises(ConfigError, match=r"another configuration \(seed: 0 there, 9 now\)"):
        train_teacher(other)
    second = weights(train_teacher(other, resume="never"))
    assert not torch.equal(first["tokens.weight"], second["tokens.weight"])
    seen = interrupt(monkeypatch, 0, lambda: None)
    assert weights(train_teacher(config, resume="never")).keys() == first.keys()
    assert seen == ["teacher"]


def test_a_run_folder_of_another_configuration_is_refused(tiny: Make, finished: RunResult) -> None:
    config = tiny(finished.root, teacher={"learning_rate": 0.5})
    expected = r"teacher\.learning_rate: .* there, 0\.5 now\); use another --output-dir"
    with pytest.raises(ConfigError, match=expected):
        run(config)
    # What does not change the result may differ.
    free = tiny(finished.root, log_every=7, evaluation={"rows": 3})
    assert run(free).student == finished.student


def test_a_path_to_resume_from_must_be_of_the_phase(
    tiny: Make, finished: RunResult, tmp_path: Path
) -> None:
    of_teacher = list_checkpoints(finished.root / "checkpoints" / "teacher")[-1][1]
    config = tiny(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is a checkpoint of phase 'teacher'"):
        run(config, "stage1", teacher=finished.root / "teacher", resume=of_teacher)
    with pytest.raises(UsageError, match="needs its --phase"):
        run(config, resume=of_teacher)


def test_distil_continues_the_first_unfinished_stage_from_a_given_checkpoint(
    tiny: Make, finished: RunResult, tmp_path: Path, weights: Weights, same: Same
) -> None:
    of_stage1 = list_checkpoints(finished.root / "checkpoints" / "stage1")[0][1]
    config = tiny(tmp_path / "run")
    student = distill(config, finished.root / "teacher", resume=of_stage1)
    assert same(weights(student), weights(finished.root / "stage2"))
    for phase in ("stage1", "stage2"):
        assert same(last_state(finished.root, phase), last_state(tmp_path / "run", phase))


def test_starting_over_never_removes_the_teacher_it_was_given(
    tiny: Make, tmp_path: Path, finished: RunResult, weights: Weights, same: Same
) -> None:
    config = tiny(tmp_path / "run", teacher={"steps": 2})
    teacher = train_teacher(config)
    before = weights(teacher)
    with pytest.raises(UsageError, match="would remove the teacher"):
        run(config, teacher=teacher, resume="never")
    run(config, "stage1", teacher=teacher)
    # Stage 2 starts over from stage 1, which stays.
    run(config, "stage2", teacher=teacher)
    first = last_state(tmp_path / "run", "stage2")
    run(config, "stage2", teacher=teacher, resume="never")
    assert same(last_state(tmp_path / "run", "stage2"), first)
    assert same(weights(teacher), before)


def test_stage_2_needs_stage_1(tiny: Make, finished: RunResult, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run --phase stage1 first"):
        run(tiny(tmp_path / "a"), "stage2", teacher=finished.root / "teacher")
    with pytest.raises(UsageError, match="train it with --phase teacher"):
        run(tiny(tmp_path / "b"), "stage1")
    with pytest.raises(UsageError, match="phase must be one of"):
        run(tiny(tmp_path / "c"), "stage3")
    with pytest.raises(UsageError, match="cannot go with --phase teacher"):
        run(tiny(tmp_path / "d"), "teacher", teacher=finished.root / "teacher")
