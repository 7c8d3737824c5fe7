"""What a run folder refuses: other data or another teacher, and writes that fail."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from dlmone_fast.config import Config
from dlmone_fast.errors import CheckpointError, ConfigError, DataError
from dlmone_fast.files import write_atomically
from dlmone_fast.models.folder import load_folder
from dlmone_fast.training import RunResult, pipeline, run, run_files, train_teacher, workspace

Make = Callable[..., Config]


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


@pytest.fixture
def of_rows(tiny: Make, finished: RunResult, tmp_path: Path) -> Config:
    """A run on a folder of rows that may be changed, without a run folder yet."""
    shutil.copytree(finished.root / "data", tmp_path / "rows")
    return tiny(
        tmp_path / "run", data_dir=str(tmp_path / "rows"), data={"task": "custom"},
        teacher={"steps": 2},
    )  # fmt: skip


def without_the_last_row(config: Config, split: str) -> None:
    rows = Path(config.data_dir) / f"{split}.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]), encoding="utf-8")


def test_a_finished_phase_of_other_data_is_not_taken_for_this_one(of_rows: Config) -> None:
    train_teacher(of_rows)
    without_the_last_row(of_rows, "valid")
    with pytest.raises(ConfigError, match=r"teacher: was made from another valid than") as caught:
        train_teacher(of_rows)
    assert "never" not in str(caught.value)


def test_a_checkpoint_of_other_data_is_refused(of_rows: Config) -> None:
    shutil.rmtree(train_teacher(of_rows))
    without_the_last_row(of_rows, "valid")
    with pytest.raises(ConfigError, match=r"step-\d+: was made from another valid than"):
        train_teacher(of_rows)


def test_a_student_of_another_teacher_is_not_taken_for_this_ones(copied: RunResult) -> None:
    other = copied.root.parent / "other"
    again = dataclasses.replace(copied.workspace.config, seed=99, output_dir=str(other))
    teacher = run(again, "teacher").teacher
    assert teacher is not None
    with pytest.raises(ConfigError, match="stage1: was made from another teacher"):
        run(copied.workspace.config, "stage1", teacher=teacher)


def test_a_run_folder_that_cannot_be_made_is_named(tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/run: cannot be written \(Not a directory\)"):
        train_teacher(tiny(tmp_path / "file" / "run"))


def test_a_configuration_that_cannot_be_written_is_named(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, chunks: Iterable[bytes]) -> None:
        if path.name == "config.toml":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, chunks)

    monkeypatch.setattr(run_files, "write_atomically", full)
    with pytest.raises(CheckpointError, match=r"config\.toml: cannot be written \(No space left"):
        train_teacher(tiny(tmp_path / "run"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed = " + b"9" * 5000, "is not valid TOML: Exceeds the limit"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "is nested too deeply"),
        (b"# " + b"a" * (1 << 20), "is larger than the 1,048,576 bytes"),
        (b"\xff", "is not UTF-8 text"),
        (b"seed = -1", "seed must be between"),
        (None, r"cannot be read \(Is a directory\)"),
    ],
)
def test_an_earlier_configuration_that_cannot_be_read_is_named(
    tiny: Make, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "run" / "config.toml"
    file.parent.mkdir()
    file.mkdir() if content is None else file.write_bytes(content)
    wanted = rf"^{re.escape(str(file))}: is not a configuration that a run .* \({message}.*away$"
    with pytest.raises(ConfigError, match=wanted):
        train_teacher(tiny(tmp_path / "run"))


def test_a_card_holds_no_path_of_the_machine(finished: RunResult) -> None:
    for name in ("teacher", "stage1", "stage2"):
        card = (finished.root / name / "README.md").read_text(encoding="utf-8")
        assert 'model="path/to/this/folder")' in card
        assert str(finished.root.parent) not in card


def test_metrics_that_cannot_be_written_are_named(tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written \(No space left"):
        train_teacher(tiny(tmp_path / "run"))


def test_a_log_that_cannot_be_written_does_not_end_the_training(
    tiny: Make, finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Line by line, as Python's own stderr.
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        teacher = train_teacher(tiny(tmp_path / "run"))
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            print("a line", file=full)
        # What closing would write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    expected = load_folder(finished.root / "teacher").tensors
    assert all(torch.equal(v, expected[k]) for k, v in load_folder(teacher).tensors.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"neither test\.jsonl nor"), ("{}\n", r"test\.jsonl, line 1: key 'src' is missing")],
)
@pytest.mark.parametrize("phase", ["all", "stage2"])
def test_the_test_split_is_checked_before_training(
    tiny: Make, tmp_path: Path, content: str | None, message: str, phase: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    row = json.dumps({"src": "is tea good", "trg": "is tea healthy"}) + "\n"
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text(row)
    if content is not None:
        (data / "test.jsonl").write_text(content)
    config = tiny(tmp_path / "run", data_dir=str(data), data={"task": "qqp"})
    with pytest.raises(DataError, match=message):
        run(config, phase)
    assert not (tmp_path / "run").exists()


def test_a_given_teachers_tokenizer_takes_the_configured_length(
    tiny: Make, tmp_path: Path, finished: RunResult
) -> None:
    config = tiny(tmp_path / "run", data={"max_chars": 321})
    opened, _ = pipeline._open_with_teacher(config, finished.root / "teacher", "auto")
    assert opened.tokenizer.max_chars == 321


def test_training_leaves_the_callers_random_numbers_alone(tiny: Make, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_teacher(tiny(tmp_path / "run", teacher={"steps": 2}))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_torchs_probe_a_cpu_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert workspace.multiplies_bf16(torch.device("cpu")) is False
