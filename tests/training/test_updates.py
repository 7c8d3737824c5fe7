"""Single updates: accumulation, non-finite values, frozen parts, and what a stage starts from."""

from __future__ import annotations

import copy
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
from dlmone_fast.models.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from dlmone_fast.models.denoiser import denoiser_from_folder, load_teacher
from dlmone_fast.models.folder import load_folder
from dlmone_fast.networks.layers import Attention
from dlmone_fast.training import RunResult, pipeline, run
from dlmone_fast.training.diagnostics import DiscriminatorAccuracy, gradient_norms
from dlmone_fast.training.distill_phase import DistillPhase
from dlmone_fast.training.ranks import Ranks
from dlmone_fast.training.stage import Stage
from dlmone_fast.training.teacher_phase import TeacherPhase
from dlmone_fast.training.workspace import open_workspace

Make = Callable[..., Config]
Weights = Callable[[Path], dict[str, Tensor]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Phase = TeacherPhase | DistillPhase


def disturb(module: nn.Module) -> None:
    """Move ψ away from φ, where the SiD loss is zero."""
    torch.manual_seed(4)
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))


def without_dropout(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, Attention):
            part.dropout = 0.0


def teacher_phase(config: Config) -> TeacherPhase:
    return TeacherPhase(open_workspace(config), {})


def stage_phase(config: Config, finished: RunResult, index: int = 1) -> DistillPhase:
    assert finished.teacher is not None
    teacher = denoiser_from_folder(load_folder(finished.teacher))
    return DistillPhase(open_workspace(config), index, teacher, teacher.lm.backbone, {})


def gradients_of(phase: Phase, step: int) -> dict[str, Tensor]:
    """The gradients that an update hands to its guard."""
    guard = phase.guard if isinstance(phase, TeacherPhase) else phase.stage.guard
    found: dict[str, Tensor] = {}

    def catch(what: str, loss: Tensor, optimizer: torch.optim.Optimizer, *clips: float) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found.update({f"{what} {i}": p.grad.clone() for i, p in enumerate(parameters)})
        found[f"{what} loss"] = loss
        optimizer.zero_grad()

    guard.apply = catch  # type: ignore[assignment,method-assign]
    phase.update(step)
    return found


def assert_close(full: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
    assert full.keys() == parts.keys()
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in full.values())
    for name, expected in full.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_to_the_teachers_batch(tiny: Make, tmp_path: Path) -> None:
    found = []
    for size in (8, 3):
        config = tiny(tmp_path / str(size), teacher={"micro_batch_size": size})
        phase = teacher_phase(config)
        without_dropout(phase.lm)
        found.append(gradients_of(phase, 2))
    assert_close(*found)


def test_micro_batches_add_up_to_a_stages_batch(
    tiny: Make, finished: RunResult, tmp_path: Path
) -> None:
    found = []
    for size in (8, 2):
        config = tiny(
            tmp_path / str(size),
            distill={"stage1": {"micro_batch_size": size, "adversarial_warmup_steps": 0}},
        )
        phase = stage_phase(config, finished)
        disturb(phase.stage.score)
        without_dropout(phase.stage.score)
        without_dropout(phase.stage.generator)
        found.append(gradients_of(phase, 3))
    assert {name.split()[0] for name in found[0]} == {"score", "generator"}
    assert_close(*found)


def snapshot(phase: Phase) -> dict[str, Tensor]:
    tensors, _ = phase.state()
    return {f"{g}/{k}": v.clone() for g, values in tensors.items() for k, v in values.items()}


def poison_gradient(module: nn.Module) -> None:
    module.requires_grad_(True)
    parameter = next(p for p in module.parameters() if p.dim() == 2)
    parameter.register_hook(lambda gradient: gradient * math.nan)


def poison_teacher_loss(phase: TeacherPhase) -> None:
    original = phase.terms

    def terms(*args: Any) -> dict[str, Tensor]:
        return {k: v * math.nan for k, v in original(*args).items()}

    phase.terms = terms  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_teacher_step_changes_nothing_and_is_counted(
    tiny: Make, tmp_path: Path, same: Same, where: str
) -> None:
    phase = teacher_phase(tiny(tmp_path / "run", max_bad_steps=3))
    phase.update(0)
    before = snapshot(phase)
    if where == "loss":
        poison_teacher_loss(phase)
    else:
        poison_gradient(phase.lm)
    for step in (1, 2):
        assert phase.update(step)["skipped"] == step
    assert same(snapshot(phase), before)
    with pytest.raises(DivergedError, match="3 steps in a row"):
        phase.update(3)
    assert same(snapshot(phase), before)


@pytest.mark.parametrize("network", ["score", "generator"])
def test_a_non_finite_step_of_a_stage_changes_only_the_other_network(
    tiny: Make, finished: RunResult, tmp_path: Path, same: Same, network: str
) -> None:
    phase = stage_phase(tiny(tmp_path / "run", max_bad_steps=3), finished)
    for step in range(3):
        phase.update(step)
    before = snapshot(phase)
    poison_gradient(getattr(phase.stage, network))
    for count in (1, 2):
        assert phase.update(2 + count)["skipped"] == count
    after = snapshot(phase)
    changed = {name.split("/")[0] for name in after if not torch.equal(after[name], before[name])}
    of_score = {"score", "score_optimizer"}
    expected = {"generator", "generator_optimizer", "ema"} if network == "score" else of_score
    assert changed - {"accuracy"} == expected
    with pytest.raises(DivergedError) as caught:
        phase.update(5)
    assert str(caught.value).startswith({"score": "score estimator"}.get(network, network))


def test_a_diverged_run_stops_with_its_last_good_checkpoint(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TeacherPhase.terms

    def terms(self: TeacherPhase, rows: Any, t: Tensor, step: int, slots: Tensor) -> Any:
        found = original(self, rows, t, step, slots)
        return {k: v * (math.nan if step >= 3 else 1.0) for k, v in found.items()}

    monkeypatch.setattr(TeacherPhase, "terms", terms)
    with pytest.raises(DivergedError) as caught:
        run(tiny(tmp_path / "run", max_bad_steps=3), "teacher")
    assert caught.value.exit_code == 5
    step, path = list_checkpoints(tmp_path / "run" / "checkpoints" / "teacher")[-1]
    assert step == 4
    assert load_checkpoint(path).state["skipped"] == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any('"loss": "nan"' in line for line in lines)
    assert not any("NaN" in line for line in lines)


def test_distillation_leaves_the_teacher_and_the_embeddings_alone(
    tiny: Make, finished: RunResult, tmp_path: Path, weights: Weights
) -> None:
    phase = stage_phase(tiny(tmp_path / "run"), finished)
    before = {k: v.clone() for k, v in phase.teacher.state_dict().items()}
    for step in range(4):
        phase.update(step)
    assert all(torch.equal(v, before[k]) for k, v in phase.teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in phase.teacher.parameters())
    teacher, stage1, stage2 = (weights(finished.root / p) for p in ("teacher", "stage1", "stage2"))
    for student in (stage1, stage2):
        assert torch.equal(student["tokens.weight"], teacher["tokens.weight"])
        assert torch.equal(student["tokens.bias"], teacher["tokens.bias"])
    trained = phase.stage.generator.state_dict()
    start = phase.teacher.lm.backbone.state_dict()
    assert sum(not torch.equal(trained[k], start[k]) for k in start) > len(start) / 2


def test_the_teacher_and_the_network_not_updated_run_without_dropout(
    tiny: Make, finished: RunResult, tmp_path: Path
) -> None:
    stage = stage_phase(tiny(tmp_path / "run"), finished).stage
    modes: list[tuple[bool, bool, bool]] = []
    stage.teacher.register_forward_hook(lambda *_: modes.append(now()))
    stage.score.register_forward_hook(lambda *_: modes.append(now()))

    def now() -> tuple[bool, bool, bool]:
        return stage.teacher.training, stage.generator.training, stage.score.training

    stage.update_score(0, 4)
    assert modes == [(False, False, True)] * 2
    modes.clear()
    stage.update_generator(0, 4, diagnose=False)
    assert modes == [(False, True, False)] * 2


class StopHereError(Exception):
    """Ends a run once its phase has been built."""


def built_phase(
    config: Config, name: str, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> DistillPhase:
    """The phase as the pipeline builds it, before its first update."""
    caught: list[DistillPhase] = []

    def catch(phase: DistillPhase, *_: Any) -> None:
        caught.append(phase)
        raise StopHereError

    monkeypatch.setattr(pipeline, "run_phase", catch)
    with pytest.raises(StopHereError):
        run(config, name, teacher=teacher)
    return caught[0]


def test_stage_2_starts_from_the_best_student_with_a_fresh_score_estimator(
    tiny: Make,
    finished: RunResult,
    tmp_path: Path,
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A stage 1 student that differs from the teacher, whichever step was the best.
    other = stage_phase(tiny(tmp_path / "run"), finished)
    for parameter in other.stage.generator.parameters():
        parameter.data.add_(0.01)
    student = other.student(dict(other.stage.generator.named_parameters()))
    pipeline.publish(other.workspace, other, student, "test")
    assert finished.teacher is not None
    phase = built_phase(other.workspace.config, "stage2", finished.teacher, monkeypatch)
    stage = phase.stage
    best = load_teacher(tmp_path / "run" / "stage1").lm.backbone.state_dict()
    generator = stage.generator.state_dict()
    assert all(torch.equal(generator[k], best[k]) for k in best)
    assert all(torch.equal(stage.ema.values[k], best[k]) for k in best)
    phi = load_teacher(finished.teacher).lm.backbone.state_dict()
    assert not torch.equal(phi["position.weight"], best["position.weight"])
    psi = stage.score.backbone.state_dict()
    assert all(torch.equal(psi[k], phi[k]) for k in phi)
    assert not stage.score.head.weight.any()
    assert not stage.generator_optimizer.state
    assert not stage.score_optimizer.state
    assert stage.seed != other.stage.seed


class Silent:
    """A progress that keeps nothing."""

    def record(self, step: int, values: Any) -> None: ...

    def say(self, text: str) -> None: ...


def test_the_best_student_is_kept_raw_or_averaged(
    tiny: Make, finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = stage_phase(tiny(tmp_path / "run"), finished)
    # At step 0 the average is the student itself: only one is scored.
    script = iter([0.3, 0.2, 0.4, 0.4, 0.1])
    scores = lambda _: {"bleu": next(script), "self_bleu": 0.5}  # noqa: E731
    monkeypatch.setattr(phase.validator, "scores", scores)
    monkeypatch.setattr(phase.validator, "show_samples", lambda *_: None)
    expected = [(0.3, "raw at step 0"), (0.4, "ema at step 3")]
    phase.validate(0, Silent())  # type: ignore[arg-type]
    assert (phase.best_score, phase.best_of) == expected[0]
    # ψ's warm-up does not move θ: nothing new to measure.
    phase.validate(2, Silent())  # type: ignore[arg-type]
    for value in phase.stage.ema.values.values():
        value.add_(1)
    kept = copy.deepcopy(phase.stage.ema.values)
    phase.validate(3, Silent())  # type: ignore[arg-type]
    assert (phase.best_score, phase.best_of) == expected[1]
    for value in phase.stage.ema.values.values():
        value.add_(1)
    phase.validate(6, Silent())  # type: ignore[arg-type]
    assert (phase.best_score, phase.best_of) == expected[1]
    assert all(torch.equal(phase.best[k], kept[k]) for k in kept)


def test_a_stage_without_adversarial_terms_resumes(
    tiny: Make, finished: RunResult, tmp_path: Path, same: Same
) -> None:
    plain = {"score_adversarial_weight": 0.0, "generator_adversarial_weight": 0.0}
    config = tiny(tmp_path / "run", distill={"stage1": plain})
    phase, again = (stage_phase(config, finished) for _ in range(2))
    for step in range(4):
        phase.update(step)
    tensors, state = phase.state()
    path = save_checkpoint(tmp_path / "checkpoints", 4, tensors, state, "")
    again.restore(load_checkpoint(path))
    assert same(snapshot(again), snapshot(phase))
    for one in (phase, again):
        one.update(4)
    assert same(snapshot(again), snapshot(phase))
    assert not phase.stage.score.head.weight.any()


def test_options_of_a_stage_change_its_losses_as_they_say(
    tiny: Make, finished: RunResult, tmp_path: Path
) -> None:
    def losses(name: str, **changes: Any) -> Any:
        stage_keys = {"adversarial_warmup_steps": 0, **changes.pop("stage1", {})}
        config = tiny(tmp_path / name, distill={"stage1": stage_keys, **changes})
        stage: Stage = stage_phase(config, finished).stage
        disturb(stage.score)
        return stage._generator_losses(0, torch.arange(8))

    base = losses("base")
    scaled = losses("scaled", stage1={"sid_scale": 100.0, "adversarial_scale": 0.01})
    torch.testing.assert_close(scaled.sid, 100 * base.sid)
    torch.testing.assert_close(scaled.adversarial, 0.01 * base.adversarial)
    divided = losses("divided", divide_by_weight=True)
    torch.testing.assert_close(divided.adversarial, base.adversarial / base.weight)
    noised = losses("noised", embedding_noise=True)
    assert torch.equal(noised.x, base.x)
    assert not torch.equal(noised.sid, base.sid)
    assert not torch.equal(losses("unscaled", scale_latent=False).x, base.x)
    floored = losses("floored", stage1={"weight_floor": 1.0})
    assert bool((floored.weight >= base.weight).all())
    late = losses("late", stage1={"adversarial_warmup_steps": 1})
    assert not late.adversarial.any()


def test_discriminator_accuracy_counts_target_tokens_by_quarter_of_t() -> None:
    accuracy = DiscriminatorAccuracy(100)
    t = torch.tensor([0, 99])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    real = torch.tensor([[-1.0, 1, -1], [1, 1, 1]])
    fake = torch.tensor([[1.0, -1, -1], [1, -1, 1]])
    accuracy.add(t, real, mask, fake, mask)
    assert accuracy.take() == {}
    accuracy.merge(Ranks())
    assert accuracy.take() == {"accuracy_t0": 0.75, "accuracy_t3": pytest.approx(4 / 6)}
    assert accuracy.take() == {}


def test_gradient_norms_count_target_positions_of_each_term() -> None:
    x = torch.zeros(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    terms = {"sid": (3 * x).sum((1, 2)), "adversarial": torch.zeros(2)}
    found = gradient_norms(terms, x, mask)
    # Rows have 8 and 4 target entries of gradient 3; a term without gradient is left out.
    assert found == {"sid_gradient_at_x": pytest.approx(1.5 * (8**0.5 + 4**0.5))}


def test_a_stage_learns_from_fewer_rows_than_half_a_batch(
    tiny: Make, finished: RunResult, tmp_path: Path
) -> None:
    sizes = {"batch_size": 256, "micro_batch_size": 256}
    config = tiny(tmp_path / "run", data={"train_rows": 100}, distill={"stage1": sizes})
    result = run(config, "stage1", teacher=finished.root / "teacher")
    assert len(result.workspace.cache("train")) == 100
    assert result.student is not None
    lines = (result.root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lags = [record["fake_net_lag"] for record in map(json.loads, lines) if "fake_net_lag" in record]
    assert lags
    assert all(math.isfinite(lag) for lag in lags)
