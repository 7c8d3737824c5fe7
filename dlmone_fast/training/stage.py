"""One stage of distillation: DLM-One's Algorithm 1 (arXiv 2506.00290).

φ is frozen; ψ learns the generator's score and to tell real from generated; θ follows the
difference of the two scores and fools the discriminator. All three share φ's frozen embeddings,
and every loss runs over target positions with the clean source kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dlmone_fast.config import DistillConfig, StageConfig
from dlmone_fast.data.batches import BatchStream, batch
from dlmone_fast.diffusion import Draw
from dlmone_fast.kernels.distillation_loss import distillation_loss, weight_floor
from dlmone_fast.kernels.noise import Stream, normal, uniform_integers
from dlmone_fast.losses.adversarial import discriminator_loss, generator_adversarial_loss
from dlmone_fast.losses.distillation import score_matching_loss
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.networks import Backbone, ScoreEstimator
from dlmone_fast.samplers.one_step import generate_embeddings
from dlmone_fast.training.diagnostics import DiscriminatorAccuracy, gradient_norms
from dlmone_fast.training.loop import reseed_dropout
from dlmone_fast.training.optim import Ema, UpdateGuard, adamw, learning_rate, set_learning_rate
from dlmone_fast.training.teacher_phase import autocast
from dlmone_fast.training.workspace import Workspace

_HELD_OUT_STEP = 1 << 31


@dataclass(frozen=True)
class Conditions:
    """A micro-batch of training rows: ids, mask, the embedding table, and places in the batch."""

    ids: Tensor
    mask: Tensor
    table: Tensor
    slots: Tensor

    @cached_property
    def embeddings(self) -> Tensor:
        """The clean embeddings [B, L, d]."""
        return self.table[self.ids]


@dataclass(frozen=True)
class GeneratorTerms:
    """Each row's share [B] of the batch's weighted mean losses of θ, at generated x [B, L, d]; the
    mask of x, and SiD's denominator [B]."""

    sid: Tensor
    adversarial: Tensor
    x: Tensor
    mask: Tensor
    weight: Tensor


class Stage:
    """The three networks of a stage and the updates of ψ and θ.

    An update is a pure function of its step: rows, z, t, noise and dropout come from
    (seed, step, slot).
    """

    def __init__(
        self,
        workspace: Workspace,
        config: StageConfig,
        teacher: Denoiser,
        start: Backbone,
        seed: int,
    ) -> None:
        self.workspace, self.config, self.seed = workspace, config, seed
        self.shared: DistillConfig = workspace.config.distill
        self.teacher, self.schedule = teacher, teacher.schedule
        self.generator = copy.deepcopy(start).requires_grad_(True)
        reinitialised = copy.deepcopy(teacher.lm.backbone).requires_grad_(True)
        self.score = ScoreEstimator(reinitialised, self.shared.discriminator).to(workspace.device)
        if workspace.config.compile:
            self.generator.compile()
            self.score.compile()
        optimizer = (config.beta1, config.beta2, config.weight_decay)
        self.generator_optimizer = adamw(self.generator, config.generator_learning_rate, *optimizer)
        self.score_optimizer = adamw(self.score, config.score_learning_rate, *optimizer)
        self.ema = Ema(self.generator, config.ema_decay, config.ema_warmup)
        self.guard = UpdateGuard(workspace.config.max_bad_steps)
        self.accuracy = DiscriminatorAccuracy(self.schedule.num_timesteps)
        self.cache = workspace.cache("train")
        streams = (Stream.BATCH_FAKE, Stream.BATCH_REAL, Stream.DATA_ORDER)
        self.fake_rows, self.real_rows, self.generator_rows = (
            BatchStream(self.cache, seed, config.batch_size, stream) for stream in streams
        )
        # Frozen during distillation: normalised once.
        self.table = teacher.embedding.detach()
        self.weight_floor = weight_floor(config.weight_floor, self.table)

    def update_score(self, step: int, of_steps: int) -> dict[str, float]:
        """One ψ update: denoising score matching on generated text, and the discriminator."""
        c = self.config
        rate = learning_rate(c.score_learning_rate, step, of_steps, 0, c.decay)
        set_learning_rate(self.score_optimizer, rate)
        self.score.train().requires_grad_(True)
        self.generator.eval()
        dsm_sum, adversarial_sum = self._zero(), self._zero()
        for index, part in enumerate(self._micro_batches()):
            reseed_dropout(self.seed, 2 * step, index)
            dsm, adversarial = self._score_losses(step, part)
            loss = c.dsm_weight * dsm.sum()
            if c.score_adversarial_weight:
                loss = loss + c.score_adversarial_weight * adversarial.sum()
            (loss / c.batch_size).backward()
            dsm_sum += dsm.detach().sum() / c.batch_size
            adversarial_sum += adversarial.detach().sum() / c.batch_size
        norm = self.guard.apply(
            "score estimator", dsm_sum + adversarial_sum, self.score_optimizer,
            c.clip_norm, c.clip_value,
        )  # fmt: skip
        values = {"score_matching": float(dsm_sum), "discriminator": float(adversarial_sum)}
        return values if norm is None else {**values, "score_gradient_norm": norm}

    def update_generator(self, step: int, of_steps: int, diagnose: bool) -> dict[str, float]:
        """One θ update: the SiD loss, and the adversarial term once the head has learnt."""
        c = self.config
        rate = learning_rate(c.generator_learning_rate, step, of_steps, 0, c.decay)
        set_learning_rate(self.generator_optimizer, rate)
        self.generator.train(c.generator_dropout)
        # Gradients pass through ψ to x_t; those of its parameters would be work for nothing.
        self.score.eval().requires_grad_(False)
        values: dict[str, float] = {}
        total = self._zero()
        for index, part in enumerate(self._micro_batches()):
            reseed_dropout(self.seed, 2 * step + 1, index)
            at = self._generator_losses(step, part)
            terms = {"sid": at.sid, "adversarial": at.adversarial}
            if diagnose and index == 0:
                rows = {name: share * c.batch_size for name, share in terms.items()}
                values.update(gradient_norms(rows, at.x, at.mask))
            loss = (at.sid + at.adversarial).sum()
            loss.backward()
            total += loss.detach()
            for name, term in terms.items():
                values[name] = values.get(name, 0.0) + float(term.detach().sum())
            spread = float(at.weight.median() / at.weight.min())
            values["weight_max_over_median"] = max(values.get("weight_max_over_median", 0), spread)
        norm = self.guard.apply(
            "generator", total, self.generator_optimizer, c.clip_norm, c.clip_value
        )
        if norm is not None:
            values["generator_gradient_norm"] = norm
            self.ema.update(self.generator, step)
        return values

    @torch.no_grad()
    def fake_net_lag(self, step: int) -> float:
        """Score-matching loss of ψ on generated text over that of φ on real text.

        Both networks see equally noisy inputs; a ratio that rises says that ψ lags behind θ. Rows
        and noise are those of a step far beyond training: ψ has not just been fitted to them.
        """
        step += _HELD_OUT_STEP
        slots = torch.arange(min(self.config.micro_batch_size, self.config.batch_size))
        self.score.eval()
        self.generator.eval()
        t = self._draw_t(Stream.SCORE_TIMESTEP, step, slots)
        noise = self._draw(Stream.SCORE_FAKE_NOISE, step, slots)
        real = self._conditions(self.real_rows, step, slots)
        fake = self._conditions(self.fake_rows, step, slots)
        x_fake = self._generate(fake, step, Stream.SCORE_LATENT)
        time = self.schedule.network_time(t)
        with autocast(self.workspace):
            x0_fake, _ = self.score(self.schedule.q_sample(x_fake, t, noise, fake.mask), time)
            x0_real = self.teacher(self.schedule.q_sample(real.embeddings, t, noise, real.mask), t)
        of_fake = score_matching_loss(x_fake, x0_fake, fake.mask).mean()
        of_real = score_matching_loss(real.embeddings, x0_real, real.mask).mean()
        return float(of_fake / of_real)

    def _score_losses(self, step: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        fake = self._conditions(self.fake_rows, step, slots)
        with torch.no_grad():
            x = self._generate(fake, step, Stream.SCORE_LATENT)
            x = self._with_embedding_noise(x, fake, step, Stream.EMBEDDING_NOISE)
        # One t for real and generated, separate noise (Algorithm 1).
        t = self._draw_t(Stream.SCORE_TIMESTEP, step, slots)
        time = self.schedule.network_time(t)
        noise = self._draw(Stream.SCORE_FAKE_NOISE, step, slots)
        with autocast(self.workspace):
            x0, fake_logits = self.score(self.schedule.q_sample(x, t, noise, fake.mask), time)
            dsm = score_matching_loss(x, x0, fake.mask)
            if not self.config.score_adversarial_weight:
                return dsm, torch.zeros_like(dsm)
            real = self._conditions(self.real_rows, step, slots)
            _, real_logits = self.score(self._noised_text(real, t, step), time)
        self.accuracy.add(t, real_logits, real.mask, fake_logits, fake.mask)
        clamp = self.shared.logit_clamp
        scale = self.config.adversarial_scale
        loss = discriminator_loss(real_logits, real.mask, fake_logits, fake.mask, clamp)
        return dsm, scale * loss

    def _noised_text(self, real: Conditions, t: Tensor, step: int) -> Tensor:
        noise = self._draw(Stream.SCORE_REAL_NOISE, step, real.slots)
        if not self.shared.embedding_noise:
            return self.schedule.q_sample_of_tokens(real.ids, real.table, t, noise, real.mask)
        x = self._with_embedding_noise(real.embeddings, real, step, Stream.REAL_EMBEDDING_NOISE)
        return self.schedule.q_sample(x, t, noise, real.mask)

    def _generator_losses(self, step: int, slots: Tensor) -> GeneratorTerms:
        c = self.config
        given = self._conditions(self.generator_rows, step, slots)
        x = self._generate(given, step, Stream.GENERATOR_LATENT)
        t = self._draw_t(Stream.GENERATOR_TIMESTEP, step, slots)
        noise = self._draw(Stream.GENERATOR_NOISE, step, slots)
        x_noised = self._with_embedding_noise(x, given, step, Stream.GENERATOR_EMBEDDING_NOISE)
        x_t = self.schedule.q_sample(x_noised, t, noise, given.mask)
        with autocast(self.workspace):
            x0_teacher = self.teacher(x_t.detach() if c.form == "kl" else x_t, t)
            x0_score, logits = self.score(x_t, self.schedule.network_time(t))
        sid, weight = distillation_loss(
            x, x0_teacher, x0_score, given.mask,
            form=c.form, mu=c.mu, weight_floor=self.weight_floor,
            multiplier=c.sid_weight * c.sid_scale / c.batch_size,
        )  # fmt: skip
        if not c.generator_adversarial_weight or step < c.adversarial_warmup_steps:
            return GeneratorTerms(sid, torch.zeros_like(sid), x, given.mask, weight)
        adversarial = generator_adversarial_loss(logits, given.mask, self.shared.logit_clamp)
        if self.shared.divide_by_weight:
            adversarial = adversarial / weight
        scale = c.generator_adversarial_weight * c.adversarial_scale / c.batch_size
        adversarial = scale * adversarial
        return GeneratorTerms(sid, adversarial, x, given.mask, weight)

    def _generate(self, given: Conditions, step: int, stream: Stream) -> Tensor:
        """G_θ(z, source): generated targets beside the clean source, float32 [B, L, d]."""

        def predict(x: Tensor, t: Tensor) -> Tensor:
            with autocast(self.workspace):
                x0: Tensor = self.generator(x, self.schedule.network_time(t))
                return x0

        length, width = given.embeddings.shape[1:]
        device = self.workspace.device
        return generate_embeddings(
            predict,
            self.schedule,
            self.shared.t_init,
            1,
            given.embeddings,
            given.mask,
            lambda _: normal(self.seed, stream, given.slots, step, length, width, device),
            self.shared.scale_latent,
        )

    def _with_embedding_noise(
        self, x: Tensor, given: Conditions, step: int, stream: Stream
    ) -> Tensor:
        if not self.shared.embedding_noise:
            return x
        return self.schedule.embedding_noise(x, self._draw(stream, step, given.slots), given.mask)

    def _micro_batches(self) -> list[Tensor]:
        c = self.config
        return list(torch.arange(c.batch_size).split(c.micro_batch_size))

    def _conditions(self, stream: BatchStream, step: int, slots: Tensor) -> Conditions:
        rows = stream.batch_rows(step)[slots.numpy()]
        length = self.teacher.config.seq_len
        ids, mask = batch(self.cache, rows, length, self.workspace.tokenizer)
        ids, mask = ids.to(self.workspace.device), mask.to(self.workspace.device)
        return Conditions(ids, mask, self.table, slots)

    def _draw(self, stream: Stream, step: int, slots: Tensor) -> Draw:
        return Draw(self.seed, stream, slots, step)

    def _draw_t(self, stream: Stream, step: int, slots: Tensor) -> Tensor:
        low, high = self.shared.t_min, self.shared.t_max
        return uniform_integers(self.seed, stream, slots, step, low, high).to(self.workspace.device)

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.workspace.device)
