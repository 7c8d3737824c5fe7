"""Faults for the file tests: damaged copies, and a process killed at its nth system call."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from damage import DAMAGES, damage


@pytest.fixture
def damaged_copies(tmp_path: Path) -> Callable[..., Iterator[tuple[Path, str, str]]]:
    """Yield (folder, file name, kind) for seeded damages of a folder, kinds and files in turn."""

    def copies(folder: Path, count: int) -> Iterator[tuple[Path, str, str]]:
        names = sorted(path.name for path in folder.iterdir())
        for case in range(count):
            rng = random.Random(case)
            kind = DAMAGES[case % len(DAMAGES)]
            name = names[case // len(DAMAGES) % len(names)]
            copy = tmp_path / "damaged" / str(case) / folder.name
            shutil.copytree(folder, copy)
            damage(copy / name, kind, rng)
            yield copy, name, kind

    return copies


_CALLS = ("mkdir", "rename", "fsync", "chmod", "unlink", "rmdir", "open")


def _kill_at(nth: int, action: Callable[[], object]) -> None:
    """In a child: run the action and die by SIGKILL just before the nth patched system call."""
    calls = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    action()


@pytest.fixture
def killed_at_each_call() -> Callable[..., Iterator[int]]:
    """Run `action` in forked children, killed before the 1st, 2nd, … call; yield after each.

    Ends when a child finishes; `prepare` runs before each child.
    """

    def kills(prepare: Callable[[], object], action: Callable[[], object]) -> Iterator[int]:
        for nth in range(1, 500):
            prepare()
            child = os.fork()
            if child == 0:
                try:
                    _kill_at(nth, action)
                finally:
                    os._exit(1)
            _, status = os.waitpid(child, 0)
            yield nth
            if not os.WIFSIGNALED(status):
                return
        raise AssertionError("the action never finished")

    return kills
