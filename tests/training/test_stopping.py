"""SIGTERM wherever it comes: within a validation, around the training loop, and twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dlmone_fast import comparison, train
from dlmone_fast.config import Config, to_toml
from dlmone_fast.errors import InterruptedAndSavedError
from dlmone_fast.models.checkpoint import list_checkpoints, load_checkpoint
from dlmone_fast.training import RunResult, pipeline, run
from dlmone_fast.training.distill_phase import DistillPhase
from dlmone_fast.training.signals import StopRequest
from dlmone_fast.training.teacher_phase import TeacherPhase
from dlmone_fast.training.validation import Validator

Make = Callable[..., Config]
Weights = Callable[[Path], dict[str, Tensor]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]


@pytest.fixture(autouse=True)
def handler_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminated_while_busy() -> None:
    try:
        terminate()
        time.sleep(60)
    except Exception as error:
        raise AssertionError("the signal was taken for an ordinary error") from error


def test_within_cutting_the_signal_is_an_error_at_once() -> None:
    began = time.monotonic()
    with StopRequest() as stop, pytest.raises(InterruptedAndSavedError), stop.cutting():
        terminated_while_busy()
    assert stop.requested
    assert time.monotonic() - began < 30


def test_what_was_requested_before_is_not_begun() -> None:
    with StopRequest() as stop:
        terminate()
        assert stop.requested
        with pytest.raises(InterruptedAndSavedError), stop.cutting():
            raise AssertionError("was begun")


@pytest.mark.parametrize("phase", ["teacher", "stage1"])
@pytest.mark.parametrize("during", [False, True])
def test_a_validation_is_not_waited_for_but_made_after_the_resume(
    tiny: Make,
    finished: RunResult,
    tmp_path: Path,
    weights: Weights,
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    during: bool,
) -> None:
    config = tiny(tmp_path / "run")
    of = TeacherPhase if phase == "teacher" else DistillPhase
    step = 4 if phase == "teacher" else 3
    validated: list[int] = []
    original, original_samples = of.validate, Validator.show_samples

    def validate(self: Any, at: int, progress: Any) -> None:
        if at == step and not during:
            raise AssertionError("the validation was begun")
        validated.append(at)
        original(self, at, progress)

    def show_samples(self: Validator, *arguments: Any) -> None:
        if validated[-1] == step:
            terminate()
        original_samples(self, *arguments)

    original_update = of.update

    def update(self: Any, at: int) -> dict[str, float]:
        if at == step - 1 and not during:
            terminate()
        values: dict[str, float] = original_update(self, at)
        return values

    teacher = "" if phase == "teacher" else finished.root / "teacher"
    with monkeypatch.context() as patch:
        patch.setattr(of, "validate", validate)
        patch.setattr(of, "update", update)
        # The last part of a validation: by then a score may have become the best one.
        patch.setattr(Validator, "show_samples", show_samples)
        with pytest.raises(InterruptedAndSavedError, match=f"SIGTERM after {step} of"):
            run(config, phase, teacher=teacher)
    saved, path = list_checkpoints(tmp_path / "run" / "checkpoints" / phase)[-1]
    assert saved == step
    assert load_checkpoint(path).state["validated"] is False
    run(config, phase, teacher=teacher)
    assert same(weights(tmp_path / "run" / phase), weights(finished.root / phase))
    ended = load_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints" / phase)[-1][1])
    assert ended.state["validated"] is True
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    key = '"valid_loss"' if phase == "teacher" else '"raw_bleu"'
    assert any(key in line and f'"step": {step},' in line for line in lines)


@pytest.mark.parametrize("where", ["before", "publishing", "comparing"])
def test_around_the_loop_the_command_ends_with_75_too(
    tiny: Make,
    finished: RunResult,
    tmp_path: Path,
    weights: Weights,
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    config = tiny(tmp_path / "run", evaluation={"rows": 2, "teacher_steps": ""})
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    module, name = {
        "before": (pipeline, "open_workspace"),
        "publishing": (pipeline, "publish"),
        "comparing": (comparison, "compare_run"),
    }[where]
    original, calls = getattr(module, name), []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            terminate()
            time.sleep(60)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, interrupted)
    teacher = ["--teacher", str(finished.root / "teacher")]
    command = ["--config", str(tmp_path / "config.toml"), *teacher]
    with pytest.raises(InterruptedAndSavedError, match="the same command continues") as caught:
        train.main(command)
    assert caught.value.exit_code == 75
    train.main(command)
    assert same(weights(tmp_path / "run" / "stage2"), weights(finished.root / "stage2"))


def test_the_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with StopRequest() as stop:
            os.write(writer, b"ready")
            while not stop.requested:
                time.sleep(0.01)
            os.write(writer, b"asked")
            # A step that takes long.
            while True:
                time.sleep(60)
    try:
        for word in (b"ready", b"asked"):
            assert os.read(reader, 5) == word
            began = time.monotonic()
            os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(reader)
        os.close(writer)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert time.monotonic() - began < 30
