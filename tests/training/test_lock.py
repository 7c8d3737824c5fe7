"""Two trainings never write into one run folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dlmone_fast
from dlmone_fast.config import Config
from dlmone_fast.errors import CheckpointError, UsageError
from dlmone_fast.training import RunResult, distill, run
from dlmone_fast.training.lock import LOCK_NAME, only_training_in

Make = Callable[..., Config]

ONE_STEP = {"steps": 1, "warmup_steps": 0}


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """Starts a process that holds the lock of tmp_path / "run"; gives its id."""
    started: list[int] = []

    def start() -> int:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with only_training_in(tmp_path / "run"):
                os.write(writer, b"held")
                signal.pause()
            os._exit(1)
        assert os.read(reader, 4) == b"held"
        os.close(reader)
        os.close(writer)
        started.append(child)
        return child

    yield start
    for child in started:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_second_training_is_refused_until_the_first_is_gone(
    tiny: Make, tmp_path: Path, other: Callable[[], int]
) -> None:
    config, pid = tiny(tmp_path / "run", teacher=ONE_STEP), other()
    message = f"{tmp_path / 'run'}: is in use by another training, process {pid};"
    for start in (
        lambda: run(config),
        lambda: run(config, resume="never"),
        lambda: distill(config),
    ):
        with pytest.raises(UsageError, match=re.escape(message)) as caught:
            start()
        assert caught.value.exit_code == 2
    assert os.listdir(tmp_path / "run") == [LOCK_NAME]
    # A killed process keeps nothing.
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert run(config, "teacher").teacher == tmp_path / "run" / "teacher"


def test_a_folder_in_training_can_be_read(finished: RunResult) -> None:
    assert finished.student is not None
    with only_training_in(finished.root):
        model = dlmone_fast.load(finished.student)
        assert isinstance(model.generate("a text"), str)
        model.unload()


def test_the_lock_ends_with_the_run_and_with_its_failure(tiny: Make, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", teacher=ONE_STEP)
    for _ in range(2):
        with pytest.raises(UsageError, match="train it with --phase teacher"):
            run(config, "stage1")
    with only_training_in(tmp_path / "run"), pytest.raises(UsageError, match="in use by another"):
        run(config, "teacher")
    run(config, "teacher")
    # Not even a child that is still there holds it for the parent.
    with only_training_in(tmp_path / "run"):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    try:
        with only_training_in(tmp_path / "run"):
            pass
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), only_training_in(tmp_path):
        assert "cannot be locked (No locks available)" in caplog.text


def test_a_folder_that_cannot_hold_a_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"), only_training_in(tmp_path):
        pass
