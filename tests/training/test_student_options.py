"""The options of distillation that are off by default: anchor, few steps, window of t, padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlmone_fast.config import Config, resolve
from dlmone_fast.diffusion import Schedule
from dlmone_fast.errors import ConfigError
from dlmone_fast.kernels.nearest_token import nearest_token
from dlmone_fast.kernels.noise import Stream, normal
from dlmone_fast.losses.padding import behind_end
from dlmone_fast.models.checkpoint import list_checkpoints, load_checkpoint
from dlmone_fast.models.denoiser import load_teacher
from dlmone_fast.samplers.one_step import generate_embeddings, renoising_times
from dlmone_fast.training import RunResult, pipeline, run
from dlmone_fast.training import stage as module
from dlmone_fast.training.distill_phase import DistillPhase, selection_score
from dlmone_fast.training.pairs_phase import load_pairs
from dlmone_fast.training.stage import Stage
from dlmone_fast.training.window import timestep_window
from dlmone_fast.training.workspace import open_workspace

Make = Callable[..., Config]
Weights = Callable[[Path], dict[str, Tensor]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
PAIRS = {"count": 24, "per_source": 2, "steps": 5, "batch_size": 24}
ANCHOR = {"anchor_steps": 3, "anchor_weight": 0.5, "anchor_decay_steps": 2}
EVERYTHING = {
    "pairs": PAIRS,
    "decodable_margin": 2.0,
    "pad_weight": 0.4,
    "stage1": {**ANCHOR, "few_steps": 3, "anchor_learning_rate": 1e-3},
    "stage2": {"few_steps": 2},
}
SLOTS = torch.arange(8)


def phase_of(config: Config, finished: RunResult, index: int = 1) -> DistillPhase:
    """A stage on the finished run's teacher, with the run's pairs if it has any."""
    assert finished.teacher is not None
    pairs = None
    if getattr(config.distill, f"stage{index}").anchored:
        pairs, _ = load_pairs(run(config, "pairs", teacher=finished.teacher).workspace)
    teacher = load_teacher(finished.teacher)
    return DistillPhase(open_workspace(config), index, teacher, teacher.lm.backbone, {}, pairs)


@pytest.fixture
def stage(tiny: Make, finished: RunResult, tmp_path: Path) -> Callable[..., Stage]:
    def make(stage1: dict[str, Any] | None = None, **distill: Any) -> Stage:
        config = tiny(tmp_path / "run", distill={**distill, "stage1": stage1 or {}})
        return phase_of(config, finished).stage

    return make


def test_the_anchor_updates_lower_the_anchor_loss(
    tiny: Make, finished: RunResult, tmp_path: Path
) -> None:
    keys = {"anchor_steps": 60, "anchor_learning_rate": 3e-3, "score_warmup_steps": 1}
    config = tiny(tmp_path / "run", distill={"pairs": PAIRS, "stage1": keys})
    phase = phase_of(config, finished)
    losses = [phase.update(step)["anchor"] for step in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    # ψ has not moved: it starts from the teacher.
    start = phase.teacher.lm.backbone.state_dict()
    psi = phase.stage.score.backbone.state_dict()
    assert all(torch.equal(psi[name], start[name]) for name in start)
    assert not phase.stage.score_optimizer.state


def test_the_stage_itself_starts_with_a_fresh_optimiser_and_average(
    tiny: Make, finished: RunResult, tmp_path: Path
) -> None:
    config = tiny(tmp_path / "run", distill={"pairs": PAIRS, "stage1": ANCHOR})
    phase = phase_of(config, finished)
    for step in range(2):
        phase.update(step)
    assert phase.stage.generator_optimizer.state
    moving = dict(phase.stage.generator.named_parameters())
    assert any(not torch.equal(moving[k], v) for k, v in phase.stage.ema.values.items())
    phase.update(2)
    assert not phase.stage.generator_optimizer.state
    assert all(torch.equal(moving[k], v) for k, v in phase.stage.ema.values.items())
    assert phase.steps == 3 + 2 + 4


def test_the_anchor_beside_the_stage_decays_to_zero_and_reads_no_pair_then(
    tiny: Make, finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"anchor_weight": 0.8, "anchor_decay_steps": 4, "steps": 6, "score_warmup_steps": 0}
    config = tiny(tmp_path / "run", distill={"pairs": PAIRS, "stage1": keys})
    phase = phase_of(config, finished)
    weights = [phase.stage.anchor_weight(step) for step in range(6)]
    assert weights == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0, 0.0])
    assert ["anchor" in phase.update(step) for step in range(6)] == [True] * 4 + [False] * 2
    off = tiny(tmp_path / "off", distill={"stage1": {"anchor_decay_steps": 4}})
    assert not off.distill.stage1.anchored


def test_the_anchors_term_adds_its_weighted_gradient(
    tiny: Make, finished: RunResult, tmp_path: Path
) -> None:
    keys = {"anchor_weight": 0.8, "anchor_decay_steps": 1, "generator_dropout": False}
    config = tiny(tmp_path / "run", distill={"pairs": PAIRS, "stage1": keys})
    stage = phase_of(config, finished).stage
    parameters = list(stage.generator.parameters())
    found: list[list[Tensor]] = []

    def catch(*_: Any) -> None:
        found.append([p.grad.clone() for p in parameters if p.grad is not None])
        stage.generator_optimizer.zero_grad()

    stage.guard.apply = catch  # type: ignore[method-assign,assignment]
    stage.update_generator(0, 4, diagnose=False)
    # The next step has no weight any more.
    assert stage.anchor_weight(1) == 0
    stage.anchor_weight = lambda step: 0.0  # type: ignore[method-assign]
    stage.update_generator(0, 4, diagnose=False)
    gradients = torch.autograd.grad(stage._anchor_losses(0, SLOTS).mean(), parameters)
    for with_anchor, without, gradient in zip(*found, gradients, strict=True):
        torch.testing.assert_close(with_anchor - without, 0.8 * gradient, rtol=1e-3, atol=1e-5)


def test_padding_of_the_teachers_answer_weighs_less_in_the_anchor(
    tiny: Make, finished: RunResult, tmp_path: Path
) -> None:
    keys = {"stage1": {**ANCHOR, "anchor_mse_weight": 0.0}, "pairs": PAIRS}
    stages = [
        phase_of(tiny(tmp_path / str(w), distill={**keys, "pad_weight": w}), finished).stage
        for w in (1.0, 0.5, 0.0)
    ]
    for stage in stages:
        assert stage.pairs is not None
        # An answer of one token: what lies behind it is padding in every row.
        stage.pairs.ids.copy_(stage.pairs.ids.long().index_fill(1, torch.tensor([15]), 3))
        stage.generator.eval()
    full, half, none = (stage._anchor_losses(0, SLOTS) for stage in stages)
    assert not torch.equal(full, none)
    # Weighted means: n sums of text and m of padding, at weights 1, 1/2 and 0.
    pairs = stages[0].pairs
    assert pairs is not None
    which = torch.from_numpy(stages[0].pair_order.batch_rows(0))[SLOTS]
    given = stages[0]._conditions_of(pairs.rows[which].long().numpy(), SLOTS)
    sep = stages[0].workspace.tokenizer.sep_id
    behind = behind_end(pairs.ids[which].long(), given.mask, sep).sum(1)
    n = given.mask.sum(1) - behind
    padding = full * (n + behind) - none * n
    torch.testing.assert_close(half * (n + behind / 2), none * n + padding / 2)


def test_one_call_is_the_one_step_generator_and_draws_nothing(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage()
    monkeypatch.setattr("dlmone_fast.training.stage.generate_mixture", lambda *_: 1 / 0)
    made.generator.eval()
    given = made._conditions(made.generator_rows, 5, SLOTS)
    x = made._generate(given, 5, Stream.GENERATOR_LATENT, Stream.GENERATOR_CALLS)
    expected = generate_embeddings(
        made._predict, made.schedule, 1490, 1, given.embeddings, given.mask,
        lambda _: normal(made.seed, Stream.GENERATOR_LATENT, SLOTS, 5, 28, 16),
    )  # fmt: skip
    assert torch.equal(x, expected)


def test_every_number_of_calls_is_drawn_as_often_at_inferences_timesteps(
    stage: Callable[..., Stage],
) -> None:
    made = stage({"few_steps": 3, "generator_dropout": True})
    last: list[int] = []
    drafts: list[int] = []
    modes: list[bool] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        (last if made.generator.training else drafts).extend(t.tolist())
        modes.append(made.generator.training)
        return x

    made._predict = predict  # type: ignore[method-assign]
    made.generator.train()
    slots = torch.arange(64)
    given = made._conditions_of(slots.numpy(), slots)
    for step in range(30):
        made._generate(given, step, Stream.GENERATOR_LATENT, Stream.GENERATOR_CALLS)
    assert made.generator.training
    assert sorted(set(modes)) == [False, True]
    times = renoising_times(1490, 3)
    shares = [last.count(t) / len(last) for t in times]
    # 1,920 draws: a standard error of 0.011.
    assert shares == pytest.approx([1 / 3] * 3, abs=0.04)
    assert sum(shares) == pytest.approx(1)
    # Rows of two calls and of three were called first at t_init, those of three again.
    assert drafts.count(times[0]) == last.count(times[1]) + last.count(times[2])
    assert drafts.count(times[1]) == last.count(times[2])


def test_a_rows_mixture_depends_on_its_slot_alone(stage: Callable[..., Stage]) -> None:
    made = stage({"few_steps": 3})
    made.generator.eval()
    stream = (Stream.SCORE_LATENT, Stream.SCORE_CALLS)
    given = made._conditions(made.fake_rows, 2, SLOTS)
    whole = made._generate(given, 2, *stream)
    part = made._generate(made._conditions(made.fake_rows, 2, SLOTS[5:]), 2, *stream)
    torch.testing.assert_close(part, whole[5:], rtol=1e-5, atol=1e-5)


def test_t_is_drawn_where_tokens_need_their_context(stage: Callable[..., Stage]) -> None:
    config = resolve("grammar", model={"vocab_size": 199}, distill={"decodable_margin": 2.0})
    low, high = timestep_window(config)
    alpha_bar = Schedule(config.diffusion).alphas_cumprod
    log_snr = torch.log(alpha_bar / (1 - alpha_bar))
    # d = 32, V = 199, F = 1: SNR d = 2 ln V is critical.
    wanted = math.log(2 * math.log(199) / 32) + 2
    assert abs(float(log_snr[low]) - wanted) < abs(float(log_snr[low - 1] - log_snr[low + 1]))
    assert high == 1976
    made = stage(decodable_margin=2.0)
    drawn = torch.cat(
        [made._draw_t(Stream.SCORE_TIMESTEP, step, torch.arange(500)) for step in range(40)]
    )
    start = made.window[0]
    assert start > 50
    assert start <= int(drawn.min()) < start + 10
    assert 1966 <= int(drawn.max()) < 1976
    assert timestep_window(resolve("grammar", model={"vocab_size": 199})) == (0, 1976)
    late = resolve(
        "grammar", model={"vocab_size": 199}, distill={"decodable_margin": 2.0, "t_min": 700}
    )
    assert timestep_window(late) == (700, 1976)


def test_a_window_without_timesteps_is_refused_before_training(tiny: Make, tmp_path: Path) -> None:
    keys = {"decodable_margin": 0.5, "t_init": 50, "t_max": 60}
    config = tiny(tmp_path / "run", distill=keys)
    with pytest.raises(ConfigError, match=r"leaves no timestep: it starts at \d+ for this model"):
        run(config, "teacher")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_padding_is_thinned_in_every_loss_of_both_networks(stage: Callable[..., Stage]) -> None:
    made = stage(pad_weight=0.0)
    given = made._conditions(made.generator_rows, 0, SLOTS)
    # The rows' own text, cut short: this grammar has texts of one length.
    given.ids[:, 20] = made.workspace.tokenizer.sep_id
    given.ids[:, 21:] = made.workspace.tokenizer.pad_id
    kept = made._kept(given, None, 0, Stream.REAL_PAD)
    assert torch.equal(kept, given.mask * (given.ids != made.workspace.tokenizer.pad_id))
    x = made._generate(given, 0, Stream.GENERATOR_LATENT, Stream.GENERATOR_CALLS).detach()
    ends = x.clone()
    ends[:, 20] = made.table[made.workspace.tokenizer.sep_id]
    ids = nearest_token(ends, made.vocabulary)
    first = behind_end(ids, given.mask, made.workspace.tokenizer.sep_id)
    assert torch.equal(
        made._kept(given, ends, 0, Stream.GENERATOR_PAD), given.mask.masked_fill(first, 0)
    )
    assert bool(first[:, 21:].all())
    object.__setattr__(made.shared, "pad_weight", 1.0)
    assert made._kept(given, ends, 0, Stream.FAKE_PAD) is given.mask


def test_losses_do_not_read_the_padding_that_was_left_out(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage({"adversarial_warmup_steps": 0}, pad_weight=0.0)
    seen: dict[str, Tensor] = {}
    original = made._kept

    def kept(given: Any, x: Tensor | None, step: int, stream: Stream) -> Tensor:
        mask = original(given, x, step, stream).clone()
        # As if every text had ended at position 20.
        mask[:, 20:] = 0
        seen[stream.name] = mask
        return mask

    monkeypatch.setattr(made, "_kept", kept)
    for name in ("score_matching_loss", "discriminator_loss", "distillation_loss",
                 "generator_adversarial_loss"):  # fmt: skip
        _note_masks(monkeypatch, name, seen)
    made._score_losses(0, SLOTS)
    at = made._generator_losses(0, SLOTS)
    assert torch.equal(seen["score_matching_loss"], seen["FAKE_PAD"])
    assert torch.equal(seen["discriminator_loss"], seen["FAKE_PAD"])
    assert torch.equal(seen["discriminator_loss real"], seen["REAL_PAD"])
    assert torch.equal(seen["distillation_loss"], seen["GENERATOR_PAD"])
    assert torch.equal(seen["generator_adversarial_loss"], seen["GENERATOR_PAD"])
    # What is generated and noised stays the whole target.
    assert bool((at.mask[:, 20:] == 1).all())


def _note_masks(monkeypatch: pytest.MonkeyPatch, name: str, seen: dict[str, Tensor]) -> None:
    original = getattr(module, name)
    place = {"score_matching_loss": 2, "distillation_loss": 3, "generator_adversarial_loss": 1}

    def noted(*arguments: Any, **options: Any) -> Any:
        if name == "discriminator_loss":
            seen[f"{name} real"], seen[name] = arguments[1], arguments[3]
        else:
            seen[name] = arguments[place[name]]
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, noted)


class CrashError(Exception):
    """Something outside the program's control."""


def last(root: Path, phase: str) -> dict[str, Tensor]:
    tensors = load_checkpoint(list_checkpoints(root / "checkpoints" / phase)[-1][1]).tensors
    return {f"{group}/{name}": v for group, of in tensors.items() for name, v in of.items()}


def test_a_run_with_everything_on_finishes_and_resumes_exactly(
    tiny: Make,
    finished: RunResult,
    tmp_path: Path,
    weights: Weights,
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = finished.root / "teacher"
    whole = run(tiny(tmp_path / "whole", distill=EVERYTHING), teacher=teacher)
    assert whole.student == tmp_path / "whole" / "stage2"
    original, crashed = DistillPhase.update, []

    def update(self: DistillPhase, step: int) -> dict[str, float]:
        values = original(self, step)
        if (self.name, step) not in crashed:
            crashed.append((self.name, step))
            raise CrashError
        return values

    # Killed after every update of stage 1, whose checkpoints lie at every one here.
    keys = {**EVERYTHING, "stage1": {**EVERYTHING["stage1"], "save_every": 1}}  # type: ignore[dict-item]
    config = tiny(tmp_path / "pieces", distill=keys)
    run(config, "pairs", teacher=teacher)
    monkeypatch.setattr(DistillPhase, "update", update)
    for _ in range(10):
        try:
            run(config, "stage1", teacher=teacher)
        except CrashError:
            continue
        break
    assert len(crashed) == 3 + 2 + 4
    assert same(last(whole.root, "stage1"), last(tmp_path / "pieces", "stage1"))
    assert same(weights(whole.root / "stage1"), weights(tmp_path / "pieces" / "stage1"))


def test_pairs_that_were_exchanged_are_refused(
    tiny: Make, finished: RunResult, tmp_path: Path
) -> None:
    config = tiny(tmp_path / "run", distill={"pairs": PAIRS, "stage1": ANCHOR})
    teacher = finished.root / "teacher"
    run(config, "pairs", teacher=teacher)
    run(config, "stage1", teacher=teacher)
    original = pipeline.load_pairs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_pairs", lambda w: (original(w)[0], "another"))
        with pytest.raises(ConfigError, match="was made from another pairs"):
            run(config, "stage1", teacher=teacher)


def test_students_that_always_say_the_same_are_the_best_only_among_themselves() -> None:
    alike, other = {"ibleu": 0.5, "self_bleu": 0.46}, {"ibleu": -0.1, "self_bleu": 0.45}
    assert selection_score(other, "ibleu", 0.45) > selection_score(alike, "ibleu", 0.45)
    assert selection_score(alike, "ibleu", 1.0) == 0.5
    worse = alike | {"ibleu": 0.4}
    assert selection_score(alike, "ibleu", 0.45) > selection_score(worse, "ibleu", 0.45)
