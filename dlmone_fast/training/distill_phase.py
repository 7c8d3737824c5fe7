"""Both stages of distillation as phases of the training loop, with checkpoint selection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dlmone_fast.models.checkpoint import Checkpoint
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.models.optimizer_state import flatten_optimizer, restore_optimizer
from dlmone_fast.networks import Backbone, DiffusionLM
from dlmone_fast.training.loop import State, phase_seed
from dlmone_fast.training.pairs_phase import Pairs
from dlmone_fast.training.progress import Progress
from dlmone_fast.training.stage import Stage
from dlmone_fast.training.teacher_phase import guard_counts
from dlmone_fast.training.validation import Validator
from dlmone_fast.training.workspace import Workspace

_TOO_MUCH_ALIKE = 2.0
"""More than scores differ by."""


def selection_score(scores: dict[str, float], metric: str, max_self_bleu: float) -> float:
    """What the best checkpoint has most of: a metric, less by a constant above a self-BLEU."""
    # Scores of a task that is no text have no self-BLEU.
    alike = scores.get("self_bleu", 0.0) > max_self_bleu
    return scores[metric] - (_TOO_MUCH_ALIKE if alike else 0.0)


class DistillPhase:
    """A stage: ψ warm-up, then ψ and θ in turn; the best student by validation score is kept.

    With `anchor_steps` θ first learns the teacher's paired endpoints, alone.

    Raw θ and its moving average are both validated: early on the average lags, later it is the
    steadier one. Step 0 competes too, so a stage never ends worse than it began.
    """

    def __init__(
        self,
        workspace: Workspace,
        index: int,
        teacher: Denoiser,
        start: Backbone,
        inputs: dict[str, str],
        pairs: Pairs | None = None,
    ) -> None:
        self.name, self.inputs = f"stage{index}", inputs
        self.workspace = workspace
        distill = workspace.config.distill
        self.config = distill.stage1 if index == 1 else distill.stage2
        c = self.config
        self.steps = c.anchor_steps + c.score_warmup_steps + c.steps
        self.save_every, self.batch_size = self.config.save_every, self.config.batch_size
        self.validate_every = self.config.validate_every
        seed = phase_seed(workspace.config.seed, index)
        self.stage = Stage(workspace, self.config, teacher, start, seed, pairs)
        self.teacher = teacher
        self.validator = Validator(workspace)
        self.best: dict[str, Tensor] = {}
        self.best_score, self.best_of = float("-inf"), ""

    def update(self, step: int) -> dict[str, float]:
        if step < self.config.anchor_steps:
            values = self.stage.update_anchor(step)
            if step == self.config.anchor_steps - 1:
                self.stage.end_anchor()
            return values | self._skipped()
        return self._update(step - self.config.anchor_steps)

    def _update(self, step: int) -> dict[str, float]:
        c, stage = self.config, self.stage
        generator_step = step - c.score_warmup_steps
        updates = c.score_steps if generator_step >= 0 else 1
        of_steps = (c.score_warmup_steps + c.steps) * c.score_steps
        values: dict[str, float] = {}
        for k in range(updates):
            score_step = step * c.score_steps + k
            values.update(stage.update_score(score_step, of_steps))
        if generator_step >= 0:
            diagnose = generator_step % self.workspace.config.distill.diagnose_every == 0
            values.update(stage.update_generator(generator_step, c.steps, diagnose))
            if diagnose:
                values["fake_net_lag"] = stage.fake_net_lag(step * c.score_steps)
        if (c.anchor_steps + step + 1) % self.workspace.config.log_every == 0:
            values.update(stage.accuracy.take())
        return values | self._skipped()

    def _skipped(self) -> dict[str, float]:
        skipped = self.stage.guard.skipped
        return {"skipped": float(skipped)} if skipped else {}

    def validate(self, step: int, progress: Progress) -> None:
        if self._measured_before(step):
            return
        weights: dict[str, dict[str, Tensor]] = {
            "raw": dict(self.stage.generator.named_parameters())
        }
        if step > 0:
            weights["ema"] = dict(self.stage.ema.values)
        config = self.workspace.config.distill
        metric, shown = config.selection_metric, []
        for which, values in weights.items():
            student = self.student(values)
            scores = self.validator.scores(student)
            progress.record(step, {f"{which}_{name}": value for name, value in scores.items()})
            shown.append(f"{which} {metric} {scores[metric]:.4f}")
            score = selection_score(scores, metric, config.selection_max_self_bleu)
            if score > self.best_score:
                self.best_score, self.best_of = score, f"{which} at step {step}"
                self.best = {k: v.detach().clone() for k, v in values.items()}
        progress.say(f"{self.name} step {step}: {', '.join(shown)} (best: {self.best_of})")
        self.validator.show_samples(self.student(self.best), "student", step, progress)

    def _measured_before(self, step: int) -> bool:
        # ψ's warm-up leaves θ alone. What the anchor's updates made of it is measured once.
        first = self.validate_every if self.config.anchor_steps else 1
        return first <= step - self.config.anchor_steps <= self.config.score_warmup_steps

    def student(self, backbone: dict[str, Tensor]) -> Denoiser:
        """The student that holds the given backbone weights and the teacher's embeddings."""
        tokens = self.teacher.lm.tokens.state_dict()
        tensors = {f"tokens.{name}": value for name, value in tokens.items()}
        tensors |= {f"backbone.{name}": value.detach() for name, value in backbone.items()}
        lm = DiffusionLM.from_tensors(self.teacher.config, tensors)
        return Denoiser(lm, self.teacher.schedule).eval().requires_grad_(False)

    def state(self) -> State:
        stage = self.stage
        of_generator, generator = flatten_optimizer(
            stage.generator_optimizer, dict(stage.generator.named_parameters())
        )
        of_score, score = flatten_optimizer(
            stage.score_optimizer, dict(stage.score.named_parameters())
        )
        tensors = {
            "generator": dict(stage.generator.state_dict()),
            "score": dict(stage.score.state_dict()),
            "ema": stage.ema.values,
            "best": self.best,
            "generator_optimizer": of_generator,
            "score_optimizer": of_score,
            "accuracy": {"right": stage.accuracy.right, "count": stage.accuracy.count},
        }
        state: dict[str, Any] = {"generator_optimizer": generator, "score_optimizer": score}
        state |= {"best_score": self.best_score if self.best_of else None, "best_of": self.best_of}
        return tensors, state | stage.guard.state()

    def restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.check_step(self.steps)
        stage = self.stage
        networks: dict[str, tuple[nn.Module, Optimizer]] = {
            "generator": (stage.generator, stage.generator_optimizer),
            "score": (stage.score, stage.score_optimizer),
        }
        weights = {
            k: checkpoint.group(k, module.state_dict()) for k, (module, _) in networks.items()
        }
        average = checkpoint.group("ema", stage.ema.values)
        seen = {"right": stage.accuracy.right, "count": stage.accuracy.count}
        accuracy = checkpoint.group("accuracy", seen)
        best_of = checkpoint.value("best_of", str)
        # Nothing is the best before the first validation.
        best = checkpoint.group("best", stage.ema.values if best_of else {})
        best_score = checkpoint.value("best_score", float) if best_of else float("-inf")
        counts = guard_counts(checkpoint)
        for name, (module, optimizer) in networks.items():
            key = f"{name}_optimizer"
            restore_optimizer(
                optimizer,
                dict(module.named_parameters()),
                checkpoint.tensors.get(key, {}),
                checkpoint.value(key, dict),
                checkpoint.path / f"{key}.safetensors",
            )
            module.load_state_dict(weights[name])
        for name, value in stage.ema.values.items():
            value.copy_(average[name])
        for name, value in seen.items():
            value.copy_(accuracy[name])
        self.best = {name: value.to(self.workspace.device) for name, value in best.items()}
        self.best_of, self.best_score = best_of, best_score
        stage.guard.restore(counts)
