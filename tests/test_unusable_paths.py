"""Paths that the system does not take: an error that names them, never a traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

import dlmone_fast
from dlmone_fast import evaluate, train
from dlmone_fast.bulk.job import Job, Options
from dlmone_fast.bulk.shards import plan_shards
from dlmone_fast.data.rows import find_split
from dlmone_fast.errors import DlmOneError
from dlmone_fast.evaluation.bertscore import bertscore_f1
from dlmone_fast.evaluation.generations import read_generations, write_text
from dlmone_fast.models.checkpoint import resolve_resume
from dlmone_fast.models.diffuseq import import_teacher
from dlmone_fast.training.workspace import find_vocabulary

LONG = "x" * 300


@pytest.fixture(params=["long", "loop", "unsearchable", "file", "nul"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path of a kind that pathlib's exists(), is_dir(), resolve() or stat() raise for."""
    kind = request.param
    if kind == "long":
        return tmp_path / LONG
    if kind == "loop":
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        return tmp_path / "loop"
    if kind == "file":
        (tmp_path / "file").write_text("")
        return tmp_path / "file" / "inside"
    if kind == "nul":
        return tmp_path / "a\0b"
    # The tests may run as root, whom no folder refuses.
    closed, real = str(tmp_path / "closed"), os.stat
    os.mkdir(closed)

    def stat(name: object, *args: object, **kwargs: object) -> os.stat_result:
        if str(name).startswith(f"{closed}{os.sep}"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    return Path(closed, "inside")


def _job(path: Path) -> None:
    Job(path, path / "out", Options(model=str(path))).open()


USES: dict[str, Callable[[Path], object]] = {
    "generate": lambda path: dlmone_fast.generate("ba", model=path),
    "load": dlmone_fast.load,
    "load_teacher": dlmone_fast.load_teacher,
    "from_pretrained": dlmone_fast.from_pretrained,
    "find_split": lambda path: find_split(path, "train"),
    "data-dir": lambda path: train.main(
        ["--preset", "qqp-small", "--data-dir", str(path), "--output-dir", str(path.parent / "o")]
    ),
    "output-dir": lambda path: train.main(["--output-dir", str(path / "run"), "--phase", "stage1"]),
    "config": lambda path: train.main(["--config", str(path)]),
    "teacher": lambda path: train.main(["--teacher", str(path), "--dry-run"]),
    "vocab_file": lambda path: find_vocabulary(str(path), path.parent),
    "resume": lambda path: resolve_resume(path.parent, path),
    "import": lambda path: import_teacher(path, path.parent / "out"),
    "plan_shards": lambda path: plan_shards(path, 10),
    "job": _job,
    "bertscore": lambda path: bertscore_f1([["a"]], ["a"], str(path)),
    "generations": lambda path: read_generations([path]),
    "write_text": lambda path: write_text(path, "text"),
}


@pytest.mark.parametrize("use", USES)
def test_a_path_that_cannot_be_used_is_an_error_that_names_it(path: Path, use: str) -> None:
    if "\0" in str(path) and use in ("write_text", "generations", "job", "output-dir"):
        pytest.skip("no command line holds NUL")
    with pytest.raises(DlmOneError) as caught:
        USES[use](path)
    assert path.name[:80] in str(caught.value) or repr(str(path))[1:80] in str(caught.value)


def test_a_folder_that_is_not_there_says_why(tmp_path: Path) -> None:
    with pytest.raises(DlmOneError, match=r"no such folder \(File name too long\)"):
        find_split(tmp_path / LONG, "train")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DlmOneError, match=r"no such folder \(Too many levels of symbolic links\)"):
        dlmone_fast.load(tmp_path / "loop")


@pytest.mark.parametrize("option", ["--output", "--generations-dir"])
def test_where_an_evaluation_writes_is_proven_before_it_generates(
    tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.save(tmp_path / "model")
    (tmp_path / "test.jsonl").write_text('{"src": "ba", "trg": "ce"}\n')
    (tmp_path / "file").write_text("mine")
    from dlmone_fast.runtime import Generator

    def generate(*args: object, **kwargs: object) -> None:
        raise AssertionError("generated before it was known where to write")

    monkeypatch.setattr(Generator, "generate_candidates", generate)
    command = [str(model), "--data-dir", str(tmp_path), option, str(tmp_path / "file" / "out")]
    with pytest.raises(DlmOneError, match=r"file/out.*: cannot be written \((File|Not)"):
        evaluate.main(command)
    if option == "--output":
        with pytest.raises(DlmOneError, match=r"cannot be written \(Is a directory\)"):
            evaluate.main([*command[:-1], str(tmp_path)])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_as_long_as_names_may_be_is_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "я" * 127):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
