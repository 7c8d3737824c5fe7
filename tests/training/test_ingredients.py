"""What a preset may turn on for small teachers: off it is not there, on it resumes exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlmone_fast import comparison, train, training
from dlmone_fast.config import Config, to_toml
from dlmone_fast.data.rows import load_rows
from dlmone_fast.diffusion import LogSnrTimesteps, critical_log_snr
from dlmone_fast.errors import ConfigError, InterruptedAndSavedError
from dlmone_fast.models.checkpoint import list_checkpoints, load_checkpoint
from dlmone_fast.models.denoiser import load_teacher
from dlmone_fast.runtime import load_model as load
from dlmone_fast.training import RunResult, run, signals, teacher_phase
from dlmone_fast.training.teacher_phase import TeacherPhase
from dlmone_fast.training.workspace import open_workspace

PHASES = ("teacher", "stage1", "stage2")
Make = Callable[..., Config]
Weights = Callable[[Path], dict[str, Tensor]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]

EVERYTHING: dict[str, Any] = {
    "model": {"self_conditioning": True},
    "data": {"both_directions": True},
    "teacher": {
        "timestep_sampler": "log-snr",
        "pad_weight": 0.1,
        "condition_dropout": 0.25,
        "ema_warmup": True,
        "micro_batch_size": 3,
    },
    "distill": {"stage1": {"ema_warmup": True}, "stage2": {"ema_warmup": True}},
}


@pytest.fixture(scope="module")
def everything(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tiny(tmp_path_factory.mktemp("everything") / "run", **EVERYTHING))


def state(root: Path, phase: str) -> dict[str, Tensor]:
    tensors = load_checkpoint(list_checkpoints(root / "checkpoints" / phase)[-1][1]).tensors
    return {f"{group}/{name}": v for group, of in tensors.items() for name, v in of.items()}


class Clock:
    """Twenty seconds pass whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 20
        return self.now


def run_in_slices(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run to the end in slices of two or three steps; returns why each slice ended."""
    monkeypatch.setattr(signals, "monotonic", Clock())
    reasons: list[str] = []
    while len(reasons) < 50:
        try:
            # The limit may be another one at every start.
            run(replace(config, max_minutes=1.0 if len(reasons) % 2 else 0.5))
            return reasons
        except InterruptedAndSavedError as stop:
            reasons.append(str(stop))
    raise AssertionError(reasons)


def test_a_run_in_slices_of_time_ends_as_the_uninterrupted_one(
    tiny: Make,
    tmp_path: Path,
    weights: Weights,
    same: Same,
    everything: RunResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(tmp_path / "run", **EVERYTHING)
    reasons = run_in_slices(config, monkeypatch)
    assert reasons[0] == (
        "stopped by --max-minutes 0.5 after 2 of 7 steps of teacher; saved; "
        "the same command continues"
    )
    for phase in PHASES:
        assert any(f"steps of {phase}; saved" in reason for reason in reasons)
    for phase in PHASES:
        assert same(state(everything.root, phase), state(tmp_path / "run", phase)), phase
        assert same(weights(everything.root / phase), weights(tmp_path / "run" / phase)), phase


def test_without_a_limit_the_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "monotonic", lambda: 1e9)
    limit = signals.TimeLimit(0.0, started=0.0)
    assert not limit.reached()
    limit.check("anything")


def test_the_time_ends_nothing_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "monotonic", lambda: 61.0)
    limit = signals.TimeLimit(1.0, started=0.0)
    limit.check("stage1")
    assert limit.reached()
    with pytest.raises(InterruptedAndSavedError, match=r"--max-minutes 1 before stage1; all is"):
        limit.check("stage1")


def test_the_comparison_does_not_start_when_the_time_is_up(
    finished: RunResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = signals.TimeLimit(1.0)
    limit.reached()
    late = replace(finished, workspace=replace(finished.workspace, limit=limit))
    monkeypatch.setattr(training, "run", lambda *_: late)
    monkeypatch.setattr(comparison, "compare_run", lambda *_, **__: "the table")
    train.main([])
    assert capsys.readouterr().out == "the table\n"
    limit.started -= 60
    with pytest.raises(InterruptedAndSavedError, match="before the comparison"):
        train.main([])


def test_the_command_hands_over_when_it_began(
    finished: RunResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(training, "run", lambda *given: seen.append(given) or finished)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(finished.workspace.config), encoding="utf-8")
    train.main(["--config", str(file), "--phase", "teacher", "--max-minutes", "2.5"])
    ((config, phase, _, _, started, _),) = seen
    assert (config.max_minutes, phase) == (2.5, "teacher")
    assert 0 <= signals.monotonic() - started < 60


def test_distillation_sees_no_estimate(everything: RunResult, weights: Weights) -> None:
    name = "backbone.estimate_projection.weight"
    of_teacher = weights(everything.root / "teacher")[name]
    assert float(of_teacher.abs().max()) > 0
    for stage in ("stage1", "stage2"):
        # θ's own is φ's, as no update reaches what no call reads.
        assert torch.equal(weights(everything.root / stage)[name], of_teacher)
    assert load_teacher(everything.root / "stage2").config.self_conditioning


def watched(
    config: Config, monkeypatch: pytest.MonkeyPatch, steps: int
) -> tuple[TeacherPhase, list[tuple[Any, ...]]]:
    """A teacher phase, and the arguments of its losses over some updates."""
    calls: list[tuple[Any, ...]] = []
    original = teacher_phase.teacher_loss

    def loss(*given: Any) -> dict[str, Tensor]:
        calls.append(given)
        return original(*given)

    monkeypatch.setattr(teacher_phase, "teacher_loss", loss)
    phase = TeacherPhase(open_workspace(config), {})
    for step in range(steps):
        phase.update(step)
    return phase, calls


def test_shares_of_rows_are_drawn_row_by_row(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[Tensor, Tensor]] = []
    for size in (64, 5):
        teacher = {**EVERYTHING["teacher"], "batch_size": 64, "micro_batch_size": size}
        config = tiny(tmp_path / str(size), **{**EVERYTHING, "teacher": teacher})
        phase, calls = watched(config, monkeypatch, 4)
        pad = phase.workspace.tokenizer.pad_id
        ids, mask = (torch.cat([call[i] for call in calls]) for i in (3, 4))
        dropped = ids[:, 1].eq(pad) & mask[:, 1].eq(0)
        estimated, first = [], 0
        for call in calls:
            estimated += [first + row for row in call[9].tolist()]
            first += len(call[3])
        found.append((dropped, torch.tensor(estimated)))
        assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.1)
        assert len(estimated) / len(ids) == pytest.approx(0.5, abs=0.12)
    # Neither depends on the micro-batches.
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_share_of_estimates_reaches_almost_none_and_almost_all_rows(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for share, rows in ((1e-9, 0), (1 - 1e-9, 8)):
        teacher = {"self_conditioning_share": share}
        config = tiny(tmp_path / str(rows), model={"self_conditioning": True}, teacher=teacher)
        _, calls = watched(config, monkeypatch, 2)
        assert [len(call[9]) for call in calls] == [rows, rows]


def test_log_snr_draws_stand_where_the_rule_says(tiny: Make, tmp_path: Path) -> None:
    model = {"noise_scale": 2.0}
    config = tiny(tmp_path / "run", model=model, teacher={"timestep_sampler": "log-snr"})
    phase = TeacherPhase(open_workspace(config), {})
    assert isinstance(phase.timesteps, LogSnrTimesteps)
    critical = critical_log_snr(16, phase.workspace.tokenizer.vocab_size, 2.0)
    assert phase.timesteps.location == pytest.approx(1.15 - critical)
    assert (phase.timesteps.scale, phase.timesteps.uniform_share) == (0.85, 0.2)


def test_both_directions_are_read_in_training_alone(tiny: Make, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", data={"both_directions": True, "train_rows": 300})
    workspace = open_workspace(config)
    train_rows, valid = workspace.cache("train"), workspace.cache("valid")
    assert len(train_rows) == 600
    assert train_rows.pair(299 + 1) == train_rows.pair(0)[::-1]
    assert len(valid) == valid.stored
    assert workspace.inputs() == replace(workspace, config=tiny(tmp_path / "run")).inputs()
    assert TeacherPhase(workspace, {}).stream.rows == 600


def test_what_changes_the_weights_is_no_free_key(tiny: Make, everything: RunResult) -> None:
    with pytest.raises(ConfigError, match=r"data\.both_directions: True there, False now"):
        run(tiny(everything.root, **{**EVERYTHING, "data": {"both_directions": False}}))
    assert run(replace(everything.workspace.config, max_minutes=9.0)).student == everything.student


def test_a_run_whose_targets_begin_at_one_place(tiny: Make, tmp_path: Path) -> None:
    # 13 positions: [CLS], ten words, [SEP] [SEP]; 15 of the target are left.
    result = run(tiny(tmp_path / "run", model={"source_positions": 13}))
    assert result.student is not None
    student = load(result.student, backend="eager")
    assert student.denoiser.config.source_positions == 13
    assert student.settings.max_source_tokens == 12
    source = load_rows(result.workspace.data_dir, "test", limit=1)[0].src
    short = " ".join(source.split()[:3])
    for text in (source, short):
        output = student.generate([text], return_dict=True)
        assert len(output.token_ids[0]) == 28 - 13
    together = student.generate([source, short])
    assert together == [student.generate(source), student.generate(short)]
