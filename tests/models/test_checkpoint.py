"""Training checkpoints: exact, verified, and never fewer than there were."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resealing import edit_json
from torch import Tensor

from dlmone_fast.errors import CheckpointError
from dlmone_fast.models import checkpoint as module
from dlmone_fast.models.checkpoint import (
    find_latest,
    list_checkpoints,
    load_checkpoint,
    resolve_resume,
    save_checkpoint,
)
from dlmone_fast.models.manifest import write_manifest


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    values = torch.linspace(-1, 1, 50) * (step + 1) / 3
    return {
        "model": {"w": values},
        "optimizer": {"w/exp_avg": values**2, "w/step": torch.tensor(1.0)},
    }


def save(root: Path, step: int, **options: Any) -> Path:
    state = {"step": step, "lr": step / 3}
    return save_checkpoint(root, step, tensors_of(step), state, "seed = 0\n", **options)


def check(path: Path, step: int) -> None:
    loaded = load_checkpoint(path)
    assert loaded.step == step
    assert loaded.state == {"step": step, "lr": step / 3}
    assert loaded.config_text == "seed = 0\n"
    for name, group in tensors_of(step).items():
        for key, tensor in group.items():
            assert torch.equal(loaded.tensors[name][key], tensor)


def steps(root: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(root)]


def spoil(path: Path, name: str = "model.safetensors") -> None:
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)


def test_a_checkpoint_round_trips_exactly(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 123)
    assert path.name == "step-00000123"
    check(path, 123)


def test_an_empty_group_of_tensors_round_trips(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"optimizer": {}}, {}, "")
    assert load_checkpoint(path).tensors == {"optimizer": {}}


def test_the_newest_two_and_the_protected_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, protect={2})
    assert steps(tmp_path) == [2, 5, 6]
    save(tmp_path, 7, keep=1)
    assert steps(tmp_path) == [7]


def test_a_folder_that_holds_something_of_the_users_is_not_pruned(tmp_path: Path) -> None:
    (tmp_path / "step-00000000").mkdir()
    mine = [tmp_path / "step-00000000" / "mine", save(tmp_path, 1) / "notes.txt"]
    for file in mine:
        file.write_text("mine")
    for step in (2, 3, 4):
        save(tmp_path, step)
    assert steps(tmp_path) == [0, 1, 3, 4]
    assert [file.read_text() for file in mine] == ["mine", "mine"]
    # Nor where an older run's steps are set aside.
    (tmp_path / "abandoned-step-00000004").mkdir()
    (tmp_path / "abandoned-step-00000004" / "mine").write_text("mine")
    save(tmp_path, 2)
    assert (tmp_path / "abandoned-step-00000004" / "mine").read_text() == "mine"


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    spoil(save(tmp_path, 2))
    save(tmp_path, 3)
    assert steps(tmp_path) == [1, 2, 3]
    save(tmp_path, 4)
    assert steps(tmp_path) == [3, 4]


def test_nothing_is_deleted_when_the_new_one_does_not_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    real = module.commit_directory

    def torn(target: Path, *args: Any, **kwargs: Any) -> Path:
        path = real(target, *args, **kwargs)
        spoil(path)
        return path

    monkeypatch.setattr(module, "commit_directory", torn)
    with pytest.raises(CheckpointError, match="sha256"):
        save(tmp_path, 3)
    assert steps(tmp_path) == [1, 2, 3]
    latest, skipped = find_latest(tmp_path)
    assert latest is not None
    check(latest, 2)
    assert [path.name for path, _ in skipped] == ["step-00000003"]


def test_later_steps_of_another_past_are_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 15)
    assert steps(tmp_path) == [10, 15]
    check(tmp_path / "abandoned-step-00000030", 30)
    assert "abandoned-step-00000020" in caplog.text
    latest, _ = find_latest(tmp_path)
    assert latest is not None
    check(latest, 15)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, {"model": {"w": torch.zeros(1)}}, {}, "")
    check(save(tmp_path, 5), 5)


@pytest.mark.parametrize("again", [False, True])
def test_a_kill_at_any_call_loses_nothing(
    tmp_path: Path, again: bool, killed_at_each_call: Callable[..., Iterator[int]]
) -> None:
    """The next step is saved, or the last one saved again, and the process dies on the way."""
    target = 2 if again else 3

    def prepare() -> None:
        shutil.rmtree(tmp_path)
        save(tmp_path, 1)
        save(tmp_path, 2)

    seen = []
    for _ in killed_at_each_call(prepare, lambda: save(tmp_path, target)):
        latest, skipped = find_latest(tmp_path)
        assert latest is not None
        assert skipped == []
        seen.append(load_checkpoint(latest).step)
        check(latest, seen[-1])
        check(save(tmp_path, 4), 4)
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert len(seen) > 10
    assert seen == sorted(seen)
    assert set(seen) == ({2} if again else {2, 3})


def test_every_damage_is_an_error_that_names_the_file_and_resume_goes_back(
    tmp_path: Path, damaged_copies: Callable[..., Iterator[tuple[Path, str, str]]]
) -> None:
    save(tmp_path / "run", 1)
    newest = save(tmp_path / "run", 2)
    for copy, name, _ in damaged_copies(newest, 210):
        # A damaged manifest may blame the file that it now misstates.
        blamed = re.escape(str(copy)) if name == "manifest.json" else re.escape(name)
        with pytest.raises(CheckpointError, match=blamed):
            load_checkpoint(copy)
        shutil.copytree(tmp_path / "run" / "step-00000001", copy.parent / "step-00000001")
        assert resolve_resume(copy.parent, "auto") == copy.parent / "step-00000001"


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1)
    read = module.read_tensors

    def replaced_first(*arguments: Any) -> dict[str, Tensor]:
        save_checkpoint(tmp_path, 1, tensors_of(5), {}, "")
        return read(*arguments)

    monkeypatch.setattr(module, "read_tensors", replaced_first)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        load_checkpoint(path)


def test_auto_skips_a_damaged_checkpoint_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = save(tmp_path, 1)
    spoil(save(tmp_path, 2))
    with caplog.at_level(logging.WARNING):
        assert resolve_resume(tmp_path, "auto") == first
    assert "step-00000002" in caplog.text
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its sha256"):
        resolve_resume(tmp_path, tmp_path / "step-00000002")


def test_auto_never_and_a_path(tmp_path: Path) -> None:
    assert resolve_resume(tmp_path / "none", "auto") is None
    path = save(tmp_path, 1)
    assert resolve_resume(tmp_path, "auto") == path
    assert resolve_resume(tmp_path, "never") is None
    assert resolve_resume(tmp_path, str(path)) == path
    with pytest.raises(CheckpointError, match="step-00000001"):
        resolve_resume(tmp_path, tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_resume(tmp_path, tmp_path / "step-00000009")


def test_auto_does_not_start_again_over_damaged_checkpoints(tmp_path: Path) -> None:
    spoil(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match="choose another run folder"):
        resolve_resume(tmp_path, "auto")


def test_a_checkpoint_under_another_step_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "step-00000099")
    with pytest.raises(CheckpointError, match="mixed up"):
        load_checkpoint(tmp_path / "step-00000099")


def test_a_sealed_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").write_text('{"format": "dlmone_fast.checkpoint", "version": 9}')
    write_manifest(path)
    with pytest.raises(CheckpointError, match="version 9"):
        load_checkpoint(path)


@pytest.mark.parametrize("step", [-1, 10**12, 10**400, True, 1.0])
def test_a_step_that_no_run_reaches_is_refused(tmp_path: Path, step: Any) -> None:
    path = save(tmp_path, 1).rename(tmp_path / "kept")
    edit_json(path / "state.json", lambda head: head.update(step=step))
    with pytest.raises(CheckpointError, match=r"state\.json: must hold a whole number 'step' betw"):
        load_checkpoint(path)


def test_a_step_behind_the_end_of_its_phase_is_refused(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save(tmp_path, 5))
    checkpoint.check_step(5)
    with pytest.raises(CheckpointError, match=r"state\.json: step is 5, the phase has 4 steps; re"):
        checkpoint.check_step(4)


def test_a_number_that_json_reads_as_infinity_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    text = (path / "state.json").read_text().replace('"lr": 0.3333333333333333', '"lr": 1e999')
    (path / "state.json").write_text(text)
    write_manifest(path)
    with pytest.raises(CheckpointError, match=r"state\.json: lr must be float, got inf"):
        load_checkpoint(path).value("lr", float)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tensors_that_are_not_finite_are_refused_at_both_ends(tmp_path: Path, value: float) -> None:
    bad = {"model": {"w": torch.tensor([0.0, value])}}
    with pytest.raises(CheckpointError, match="NaN or Infinity: w"):
        save_checkpoint(tmp_path, 1, bad, {}, "")
    assert steps(tmp_path) == []
    path = save_checkpoint(tmp_path, 1, bad, {}, "", require_finite=False)
    with pytest.raises(CheckpointError, match="NaN or Infinity: w"):
        load_checkpoint(path)
    assert len(load_checkpoint(path, require_finite=False).tensors["model"]["w"]) == 2


@pytest.mark.parametrize("state", [{"best": math.inf}, {"rng": object()}])
def test_a_state_that_is_not_json_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json"):
        save_checkpoint(tmp_path, 1, {}, state, "")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["../model", "a/b", "", "a.b", "-x"])
def test_a_strange_tensor_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot name a tensor file"):
        save_checkpoint(tmp_path, 1, {name: {}}, {}, "")


def test_a_full_disk_keeps_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def full(path: Path, tensors: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"step-00000003.*No space left.*free some space"):
        save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]
    check(tmp_path / "step-00000002", 2)


def test_failing_to_delete_an_old_checkpoint_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def refused(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(module, "remove_directory", refused)
    check(save(tmp_path, 3), 3)
    assert "could not be removed" in caplog.text
