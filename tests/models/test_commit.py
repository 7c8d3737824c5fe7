"""Whole folders appear and change in one step, whatever happens in between."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlmone_fast.errors import CheckpointError, ModelFileError
from dlmone_fast.models import commit
from dlmone_fast.models.commit import commit_directory, complete_path
from dlmone_fast.models.manifest import verify_manifest


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "a.txt").write_text(text)
        (folder / "b.txt").write_text(text)

    return write


def content(target: Path) -> str:
    """The text of a complete folder; fails if the two files are of different writes."""
    folder = complete_path(target)
    verify_manifest(folder)
    texts = {(folder / name).read_text() for name in ("a.txt", "b.txt")}
    assert len(texts) == 1
    return texts.pop()


def test_a_folder_is_created_then_replaced(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    assert commit_directory(target, writer("one")) == target.resolve()
    assert content(target) == "one"
    commit_directory(target, writer("two"))
    assert content(target) == "two"
    assert os.listdir(target.parent) == ["model"]


def test_files_of_the_user_survive_a_replacement(tmp_path: Path) -> None:
    target = tmp_path / "model"
    commit_directory(target, writer("one"))
    (target / "notes.txt").write_text("mine")
    (target / "logs").mkdir()
    (target / "logs" / "x").write_text("also mine")
    commit_directory(target, writer("two"))
    assert content(target) == "two"
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "logs" / "x").read_text() == "also mine"


def test_a_folder_of_someone_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelFileError, match="will not replace"):
        commit_directory(tmp_path, writer("x"))
    with pytest.raises(ModelFileError, match="is a file"):
        commit_directory(tmp_path / "thesis.txt", writer("x"))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_at_any_call_leaves_a_complete_folder(
    tmp_path: Path, existing: bool, killed_at_each_call: Callable[..., Iterator[int]]
) -> None:
    target = tmp_path / "model"
    seen = []

    def prepare() -> None:
        if existing:
            commit_directory(target, writer("old"))
        elif complete_path(target).exists():
            commit.remove_directory(complete_path(target))

    for _ in killed_at_each_call(prepare, lambda: commit_directory(target, writer("new"))):
        exists = complete_path(target).exists()
        assert exists or not existing
        seen.append(content(target) if exists else "none")
    assert len(seen) > 10
    # Up to one point the old state stands, from there on the new one.
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {"old" if existing else "none", "new"}
    commit_directory(target, writer("last"))
    assert content(target) == "last"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "can write to"),
        (errno.EDQUOT, "quota"),
    ],
)
@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync", "chmod"])
def test_a_failing_call_leaves_the_previous_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, way_out: str
) -> None:
    target = tmp_path / "model"
    commit_directory(target, writer("old"))
    real = getattr(os, call)

    def failing(path: object, *args: object, **kwargs: object) -> object:
        # The parent's mkdir(exist_ok) is not the failure under test.
        if call == "mkdir" and ".tmp-" not in str(path):
            return real(path, *args, **kwargs)
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(CheckpointError, match=way_out) as caught:
        commit_directory(target, writer("new"), error=CheckpointError)
    monkeypatch.undo()
    assert str(target) in str(caught.value)
    assert content(target) == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_failing_second_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    commit_directory(target, writer("old"))
    real = os.rename

    def failing(source: str | Path, destination: str | Path) -> None:
        if ".tmp-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        real(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ModelFileError, match="Input/output error"):
        commit_directory(target, writer("new"))
    assert content(target) == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_loop_of_links_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ModelFileError, match="cannot be resolved"):
        commit_directory(tmp_path / "loop" / "model", writer("x"))


def test_an_interrupt_while_writing_leaves_the_previous_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    commit_directory(target, writer("old"))

    def interrupted(folder: Path) -> None:
        (folder / "a.txt").write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit_directory(target, interrupted)
    assert content(target) == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_file_size_limit_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    target = tmp_path / "model"
    commit_directory(target, writer("old"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(ModelFileError, match="ulimit"):
            commit_directory(target, writer("x" * 5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert content(target) == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_leftovers_of_dead_processes_go_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    (tmp_path / f".tmp-model-{child}").mkdir()
    (tmp_path / f".tmp-model-{os.getppid()}").mkdir()
    (tmp_path / f".tmp-other-{child}").mkdir()
    commit_directory(tmp_path / "model", writer("x"))
    assert sorted(os.listdir(tmp_path)) == sorted(
        [f".tmp-model-{os.getppid()}", f".tmp-other-{child}", "model"]
    )
