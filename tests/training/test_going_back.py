"""Values that are not finite: steps are skipped, then the last checkpoint is gone back to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlmone_fast.config import Config
from dlmone_fast.errors import DivergedError
from dlmone_fast.models.checkpoint import list_checkpoints, load_checkpoint
from dlmone_fast.training import RunResult, run
from dlmone_fast.training.distill_phase import DistillPhase
from dlmone_fast.training.optim import UpdateGuard, adamw
from dlmone_fast.training.teacher_phase import TeacherPhase

Make = Callable[..., Config]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]


def spoil(
    monkeypatch: pytest.MonkeyPatch, at: int, what: Callable[[Any], None], times: int = 1
) -> list[int]:
    """Call `what` on the phase before its update `at`, a number of times; returns all updates."""
    made: list[int] = []
    for phase_class in (TeacherPhase, DistillPhase):

        def update(self: Any, step: int, original: Any = phase_class.update) -> dict[str, float]:
            made.append(step)
            if step == at and made.count(at) <= times:
                what(self)
            values: dict[str, float] = original(self, step)
            return values

        monkeypatch.setattr(phase_class, "update", update)
    return made


def infinite_weight(phase: Any) -> None:
    network = phase.lm if isinstance(phase, TeacherPhase) else phase.stage.generator
    next(network.parameters()).data.view(-1)[0] = math.inf


def last_tensors(root: Path, phase: str) -> dict[str, Tensor]:
    tensors = load_checkpoint(list_checkpoints(root / "checkpoints" / phase)[-1][1]).tensors
    return {f"{group}/{name}": v for group, of in tensors.items() for name, v in of.items()}


@pytest.mark.parametrize(("phase", "steps"), [("teacher", 7), ("stage1", 6)])
def test_a_passing_fault_leaves_no_trace(
    tiny: Make,
    finished: RunResult,
    tmp_path: Path,
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    phase: str,
    steps: int,
) -> None:
    # Steps 4 and 5 are skipped; the next save would be after 5.
    made = spoil(monkeypatch, 4, infinite_weight)
    config = tiny(tmp_path / "run", max_bad_steps=2)
    teacher = finished.root / "teacher" if phase != "teacher" else ""
    run(config, phase, teacher=teacher)
    # In a stage ψ's update fails first: the same two steps.
    assert made == [0, 1, 2, 3, 4, 5, *range(4, steps)]
    assert same(last_tensors(tmp_path / "run", phase), last_tensors(finished.root, phase))
    assert "not finite 2 steps in a row; back to" in capsys.readouterr().err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {"phase": phase, "step": 5, "gone_back_to": 4}.items() <= next(
        record.items() for line in lines if "gone_back_to" in (record := json.loads(line))
    )


def test_weights_that_are_not_finite_are_never_saved(
    tiny: Make, finished: RunResult, tmp_path: Path, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spoil(monkeypatch, 3, infinite_weight)
    # Far fewer bad steps than allowed: it is the save after step 3 that finds it.
    run(tiny(tmp_path / "run", max_bad_steps=100), "teacher")
    assert made == [0, 1, 2, 3, *range(2, 7)]
    assert same(last_tensors(tmp_path / "run", "teacher"), last_tensors(finished.root, "teacher"))


def test_a_fault_that_comes_again_ends_the_run(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spoil(monkeypatch, 4, infinite_weight, times=100)
    config = tiny(tmp_path / "run", max_bad_steps=2)
    message = "teacher: .* 2 steps in a row, again after going back to .*step-00000004; what was"
    for _ in range(2):
        with pytest.raises(DivergedError, match=message):
            run(config, "teacher")
        assert list_checkpoints(tmp_path / "run" / "checkpoints" / "teacher")[-1][0] == 4
    assert made == [0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 0, infinite_weight)
    with pytest.raises(DivergedError, match="1 steps in a row; what was saved before is intact"):
        run(tiny(tmp_path / "run", max_bad_steps=1), "teacher")
    assert not list_checkpoints(tmp_path / "run" / "checkpoints" / "teacher")


def test_another_checkpoint_may_be_gone_back_to(
    tiny: Make, finished: RunResult, tmp_path: Path, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2, infinite_weight)
    made = spoil(monkeypatch, 4, infinite_weight)
    run(tiny(tmp_path / "run", max_bad_steps=1), "teacher")
    assert made == [0, 1, 2, 2, 3, 4, 4, 5, 6]
    assert same(last_tensors(tmp_path / "run", "teacher"), last_tensors(finished.root, "teacher"))


def test_steps_in_a_row_are_counted_across_a_restart(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TeacherPhase.terms

    def terms(self: TeacherPhase, rows: Any, t: Tensor, step: int, slots: Tensor) -> Any:
        found = original(self, rows, t, step, slots)
        return {name: value * (math.nan if step >= 3 else 1) for name, value in found.items()}

    monkeypatch.setattr(TeacherPhase, "terms", terms)
    config = tiny(tmp_path / "run", max_bad_steps=3)
    for _ in range(2):
        with pytest.raises(DivergedError):
            run(config, "teacher")
        # A count that began again at every start would let it creep on to 6, and to the end.
        step, path = list_checkpoints(tmp_path / "run" / "checkpoints" / "teacher")[-1]
        assert step == 4
        assert load_checkpoint(path).state["bad_in_a_row"] == {"teacher": 1}


def test_an_infinite_weight_behind_a_finite_loss_is_noticed() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    other = nn.Linear(2, 2)
    optimizer = adamw(network, 0.1, 0.9, 0.99, 0.0)
    guard = UpdateGuard(5, [*network.parameters(), *other.parameters()])

    def update() -> float | None:
        loss = network(torch.ones(2, 3)).square().mean()
        loss.backward()
        assert bool(torch.isfinite(loss))
        assert all(
            bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None
        )
        return guard.apply("network", loss.detach(), optimizer, 1.0)

    assert update() is not None
    for weight in (network[0].bias, other.weight):
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        good = weight.detach().clone()
        weight.data.view(-1)[1] = math.inf
        assert update() is None
        weight.data.copy_(good)
        assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert update() is not None
    assert guard.skipped == 2
