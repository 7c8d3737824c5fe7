"""One stage of distillation: DLM-One's Algorithm 1 (arXiv 2506.00290).

φ is frozen; ψ learns the generator's score and to tell real from generated; θ follows the
difference of the two scores and fools the discriminator. All three share φ's frozen embeddings,
and every loss runs over target positions with the clean source kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from dlmone_fast.config import DistillConfig, StageConfig
from dlmone_fast.data.batches import BatchStream, Rows, lengths_for, training_batch
from dlmone_fast.diffusion import Draw
from dlmone_fast.kernels.distillation_loss import distillation_loss, weight_floor
from dlmone_fast.kernels.nearest_token import Vocabulary, nearest_token
from dlmone_fast.kernels.noise import Stream, normal, uniform_integers
from dlmone_fast.losses.adversarial import discriminator_loss, generator_adversarial_loss
from dlmone_fast.losses.anchor import anchor_loss
from dlmone_fast.losses.distillation import score_matching_loss
from dlmone_fast.losses.padding import behind_end, thin_padding
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.networks import Backbone, ScoreEstimator
from dlmone_fast.networks.backbone import at_length
from dlmone_fast.samplers.one_step import generate_embeddings, generate_mixture
from dlmone_fast.training.diagnostics import DiscriminatorAccuracy, gradient_norms
from dlmone_fast.training.loop import reseed_dropout
from dlmone_fast.training.optim import Ema, UpdateGuard, adamw, learning_rate, set_learning_rate
from dlmone_fast.training.pairs_phase import Pairs
from dlmone_fast.training.teacher_phase import autocast
from dlmone_fast.training.window import timestep_window
from dlmone_fast.training.workspace import Workspace

_HELD_OUT_STEP = 1 << 31
# More than any batch has (see the configuration): what is added to a slot to name other draws.
_LARGEST_BATCH = 1 << 20
# Beyond the micro-batches of ψ's and θ's own updates.
_ANCHOR_MICRO_BATCH = _LARGEST_BATCH


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


@dataclass(frozen=True)
class GeneratorValues:
    """What is told of a micro-batch of θ's update: its share in the loss, a scalar, and in the
    two terms; the largest of SiD's weights over their median; gradient norms, or none."""

    loss: Tensor
    sid: float
    adversarial: float
    weight_spread: float
    gradient_norms: dict[str, float]


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
        pairs: Pairs | None = None,
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
        self.ranks = workspace.ranks
        # Idle: what reads an estimate, in one step, and the head without an adversarial loss.
        all_used = not teacher.config.self_conditioning
        self.shared_generator = self.ranks.loss_of(self.generator, all_used)
        all_used &= config.score_adversarial_weight > 0
        self.shared_score = self.ranks.loss_of(self.score, all_used)
        self.ema = Ema(self.generator, config.ema_decay, config.ema_warmup)
        networks = (self.generator, self.score, teacher)
        watched = [weight for network in networks for weight in network.parameters()]
        self.guard = UpdateGuard(workspace.config.max_bad_steps, watched)
        self.accuracy = DiscriminatorAccuracy(self.schedule.num_timesteps)
        self.cache = workspace.cache("train")
        streams = (Stream.BATCH_FAKE, Stream.BATCH_REAL, Stream.DATA_ORDER)
        lengths = lengths_for(self.cache, teacher.config)
        self.fake_rows, self.real_rows, self.generator_rows = (
            BatchStream(self.cache, seed, config.batch_size, stream, lengths) for stream in streams
        )
        self.pairs = pairs
        if pairs is not None:
            of_pairs = None if lengths is None else lengths[pairs.rows.long().numpy()]
            self.pair_order = BatchStream(
                pairs, seed, config.batch_size, Stream.ANCHOR_ORDER, of_pairs
            )
        self.window = timestep_window(workspace.config)
        # Frozen during distillation: normalised once.
        self.vocabulary = Vocabulary(teacher.embedding.detach())
        self.table = teacher.lm.tokens.lookup().detach()
        self.weight_floor = weight_floor(config.weight_floor, self.table)

    def update_score(self, step: int, of_steps: int) -> dict[str, float]:
        """One ψ update: denoising score matching on generated text, and the discriminator."""
        c = self.config
        rate = learning_rate(c.score_learning_rate, step, of_steps, 0, c.decay)
        set_learning_rate(self.score_optimizer, rate)
        self.score.train().requires_grad_(True)
        self.generator.eval()
        dsm_sum, adversarial_sum = self._zero(), self._zero()
        parts = self._micro_batches()
        for index, part in enumerate(parts):
            reseed_dropout(self.seed, 2 * step, self.ranks.micro_batch(index))
            dsm, adversarial = self.shared_score.backward(
                partial(self._score_loss, step, part), last=index == len(parts) - 1
            )
            dsm_sum += dsm
            adversarial_sum += adversarial
        self.accuracy.merge(self.ranks)
        dsm_sum, adversarial_sum = self.ranks.sum(torch.stack([dsm_sum, adversarial_sum]))
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
        sums = {"sid": 0.0, "adversarial": 0.0}
        total, spread = self._zero(), 0.0
        anchor_weight = self.anchor_weight(step)
        parts = self._micro_batches()
        for index, part in enumerate(parts):
            reseed_dropout(self.seed, 2 * step + 1, self.ranks.micro_batch(index))
            last = index == len(parts) - 1
            at = self.shared_generator.backward(
                partial(self._generator_loss, step, part, diagnose and index == 0),
                last=last and not anchor_weight,
            )
            total += at.loss
            sums["sid"] += at.sid
            sums["adversarial"] += at.adversarial
            spread = max(spread, at.weight_spread)
            values |= at.gradient_norms
            if anchor_weight:
                at_step = c.anchor_steps + step
                loss, anchor = self.shared_generator.backward(
                    partial(self._anchor_loss, at_step, part, anchor_weight), last=last
                )
                total += loss
                sums["anchor"] = sums.get("anchor", 0.0) + float(anchor)
        values["weight_max_over_median"] = self.ranks.largest(spread)
        values |= self.ranks.sum_values(sums)
        return values | self._apply_to_generator(total, step)

    def update_anchor(self, step: int) -> dict[str, float]:
        """One update of θ alone, towards the teacher's endpoints of the same noises."""
        c = self.config
        rate = learning_rate(c.anchor_learning_rate, step, c.anchor_steps, 0, c.decay)
        set_learning_rate(self.generator_optimizer, rate)
        self.generator.train(c.generator_dropout)
        total = self._zero()
        parts = self._micro_batches()
        for index, part in enumerate(parts):
            reseed_dropout(self.seed, step, self.ranks.micro_batch(_ANCHOR_MICRO_BATCH + index))
            loss, _ = self.shared_generator.backward(
                partial(self._anchor_loss, step, part, 1.0), last=index == len(parts) - 1
            )
            total += loss
        values = self._apply_to_generator(total, step)
        return {"anchor": float(self.ranks.sum(total)), **values}

    def end_anchor(self) -> None:
        """Start the stage itself from θ as it is now, with a fresh optimiser and average.

        The anchor's gradients are far larger than the stage's own: their second moments would
        hold back its first 1 / (1 - beta2) updates. The average would still remember φ.
        """
        self.generator_optimizer.state.clear()
        self.ema = Ema(self.generator, self.config.ema_decay, self.config.ema_warmup)

    def anchor_weight(self, step: int) -> float:
        """Weight of the anchor loss in θ update `step` of the stage itself."""
        c = self.config
        if step >= c.anchored_updates:
            return 0.0
        return c.anchor_weight * (1 - step / c.anchor_decay_steps)

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
        x_fake = self._generate(fake, step, Stream.SCORE_LATENT, Stream.SCORE_CALLS)
        time = self.schedule.network_time(t)
        with autocast(self.workspace):
            x0_fake, _ = self.score(self.schedule.q_sample(x_fake, t, noise, fake.mask), time)
            x0_real = self.teacher(self.schedule.q_sample(real.embeddings, t, noise, real.mask), t)
        # ψ learns where the positions are kept, so that is where it can lag.
        kept = self._kept(fake, x_fake, step, Stream.FAKE_PAD)
        kept_real = self._kept(real, None, step, Stream.REAL_PAD)
        of_fake = score_matching_loss(x_fake, x0_fake, kept).mean()
        of_real = score_matching_loss(real.embeddings, x0_real, kept_real).mean()
        return float(of_fake / of_real)

    def _score_loss(self, step: int, slots: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """These slots' share in ψ's loss, and in its two terms, detached."""
        c = self.config
        dsm, adversarial = self._score_losses(step, slots)
        loss = c.dsm_weight * dsm.sum()
        if c.score_adversarial_weight:
            loss = loss + c.score_adversarial_weight * adversarial.sum()
        terms = tuple(term.detach().sum() / c.batch_size for term in (dsm, adversarial))
        return loss / c.batch_size, (terms[0], terms[1])

    def _generator_loss(
        self, step: int, slots: Tensor, diagnose: bool
    ) -> tuple[Tensor, GeneratorValues]:
        """These slots' share in θ's losses but the anchor's, and what is told of it."""
        at = self._generator_losses(step, slots)
        norms: dict[str, float] = {}
        if diagnose:
            shares = {"sid": at.sid, "adversarial": at.adversarial}
            rows = {name: share * self.config.batch_size for name, share in shares.items()}
            norms = gradient_norms(rows, at.x, at.mask)
        loss = (at.sid + at.adversarial).sum()
        spread = float(at.weight.median() / at.weight.min())
        sid, adversarial = (float(term.detach().sum()) for term in (at.sid, at.adversarial))
        return loss, GeneratorValues(loss.detach(), sid, adversarial, spread, norms)

    def _anchor_loss(
        self, step: int, slots: Tensor, weight: float
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """These slots' share in the weighted anchor loss; the same detached, and unweighted."""
        anchor = self._anchor_losses(step, slots).sum() / self.config.batch_size
        loss = weight * anchor
        return loss, (loss.detach(), anchor.detach())

    def _score_losses(self, step: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        fake = self._conditions(self.fake_rows, step, slots)
        with torch.no_grad():
            x = self._generate(fake, step, Stream.SCORE_LATENT, Stream.SCORE_CALLS)
            x = self._with_embedding_noise(x, fake, step, Stream.EMBEDDING_NOISE)
            kept = self._kept(fake, x, step, Stream.FAKE_PAD)
        # One t for real and generated, separate noise (Algorithm 1).
        t = self._draw_t(Stream.SCORE_TIMESTEP, step, slots)
        time = self.schedule.network_time(t)
        noise = self._draw(Stream.SCORE_FAKE_NOISE, step, slots)
        with autocast(self.workspace):
            x0, fake_logits = self.score(self.schedule.q_sample(x, t, noise, fake.mask), time)
            dsm = score_matching_loss(x, x0, kept)
            if not self.config.score_adversarial_weight:
                return dsm, torch.zeros_like(dsm)
            real = self._conditions(self.real_rows, step, slots)
            _, real_logits = self.score(self._noised_text(real, t, step), time)
        kept_real = self._kept(real, None, step, Stream.REAL_PAD)
        self.accuracy.add(t, real_logits, kept_real, fake_logits, kept)
        clamp = self.shared.logit_clamp
        scale = self.config.adversarial_scale
        loss = discriminator_loss(real_logits, kept_real, fake_logits, kept, clamp)
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
        x = self._generate(given, step, Stream.GENERATOR_LATENT, Stream.GENERATOR_CALLS)
        t = self._draw_t(Stream.GENERATOR_TIMESTEP, step, slots)
        noise = self._draw(Stream.GENERATOR_NOISE, step, slots)
        x_noised = self._with_embedding_noise(x, given, step, Stream.GENERATOR_EMBEDDING_NOISE)
        x_t = self.schedule.q_sample(x_noised, t, noise, given.mask)
        with autocast(self.workspace):
            x0_teacher = self.teacher(x_t.detach() if c.form == "kl" else x_t, t)
            x0_score, logits = self.score(x_t, self.schedule.network_time(t))
        kept = self._kept(given, x, step, Stream.GENERATOR_PAD)
        sid, weight = distillation_loss(
            x, x0_teacher, x0_score, kept,
            form=c.form, mu=c.mu, weight_floor=self.weight_floor,
            multiplier=c.sid_weight * c.sid_scale / c.batch_size,
        )  # fmt: skip
        if not c.generator_adversarial_weight or step < c.adversarial_warmup_steps:
            return GeneratorTerms(sid, torch.zeros_like(sid), x, given.mask, weight)
        adversarial = generator_adversarial_loss(logits, kept, self.shared.logit_clamp)
        if self.shared.divide_by_weight:
            adversarial = adversarial / weight
        scale = c.generator_adversarial_weight * c.adversarial_scale / c.batch_size
        adversarial = scale * adversarial
        return GeneratorTerms(sid, adversarial, x, given.mask, weight)

    def _anchor_losses(self, step: int, slots: Tensor) -> Tensor:
        """The anchor loss [B] of pairs, θ being called once."""
        assert self.pairs is not None
        which = torch.from_numpy(self.pair_order.batch_rows(step))[slots]
        given = self._conditions_of(self.pairs.rows[which].long().numpy(), slots)
        ids = self.pairs.ids[which].long().to(self.workspace.device)
        length = given.ids.shape[1]
        z = self.pairs.latents(which, self.table.shape[1], self.workspace.device, length=length)
        ids = at_length(ids[:, :length], length)
        x = generate_embeddings(
            self._predict, self.schedule, self.shared.t_init, 1, given.embeddings, given.mask,
            lambda _: self.shared.temperature * z, self.shared.scale_latent,
        )  # fmt: skip
        weights = None
        if self.shared.pad_weight < 1:
            behind = behind_end(ids, given.mask, self.workspace.tokenizer.sep_id)
            weights = torch.where(behind, self.shared.pad_weight, 1.0)
        with autocast(self.workspace):
            return anchor_loss(
                self.teacher.lm.tokens, self.table, x, ids, given.mask, weights,
                self.config.anchor_mse_weight,
            )  # fmt: skip

    def _generate(self, given: Conditions, step: int, stream: Stream, calls: Stream) -> Tensor:
        """G_θ(z, source): generated targets beside the clean source, float32 [B, L, d]."""
        length, width = given.embeddings.shape[1:]
        device, few = self.workspace.device, self.config.few_steps

        def noise(call: int) -> Tensor:
            # A batch has fewer slots than that: no two calls share their noise.
            sample = given.slots + call * _LARGEST_BATCH
            z = normal(self.seed, stream, sample, step, length, width, device)
            return z if self.shared.temperature == 1 else self.shared.temperature * z

        if few == 1:
            return generate_embeddings(
                self._predict, self.schedule, self.shared.t_init, 1,
                given.embeddings, given.mask, noise, self.shared.scale_latent,
            )  # fmt: skip
        number = uniform_integers(self.seed, calls, given.slots, step, 1, few + 1)
        return generate_mixture(
            self._predict, self._draft, self.schedule, self.shared.t_init, few, number,
            given.embeddings, given.mask, noise, self.shared.scale_latent,
        )  # fmt: skip

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        with autocast(self.workspace):
            x0: Tensor = self.generator(x, self.schedule.network_time(t))
            return x0

    def _draft(self, x: Tensor, t: Tensor) -> Tensor:
        # What inference re-noises was made without dropout.
        training = self.generator.training
        self.generator.eval()
        x0 = self._predict(x, t)
        self.generator.train(training)
        return x0

    def _kept(self, given: Conditions, x: Tensor | None, step: int, stream: Stream) -> Tensor:
        """The mask [B, L] of the losses on generated x, or on the rows' own text: the target, with
        `pad_weight` of what lies behind the end of the text."""
        share = self.shared.pad_weight
        if share == 1:
            return given.mask
        ids = given.ids if x is None else nearest_token(x, self.vocabulary)
        behind = behind_end(ids, given.mask, self.workspace.tokenizer.sep_id)
        return thin_padding(given.mask, behind, share, self.seed, stream, step, given.slots)

    def _with_embedding_noise(
        self, x: Tensor, given: Conditions, step: int, stream: Stream
    ) -> Tensor:
        if not self.shared.embedding_noise:
            return x
        return self.schedule.embedding_noise(x, self._draw(stream, step, given.slots), given.mask)

    def _micro_batches(self) -> list[Tensor]:
        c = self.config
        return list(self.ranks.slots(c.batch_size).split(c.micro_batch_size))

    def _conditions(self, stream: BatchStream, step: int, slots: Tensor) -> Conditions:
        return self._conditions_of(stream.batch_rows(step)[slots.numpy()], slots)

    def _conditions_of(self, rows: Rows, slots: Tensor) -> Conditions:
        sizes, tokenizer = self.teacher.config, self.workspace.tokenizer
        ids, mask = training_batch(self.cache, rows, sizes, tokenizer)
        ids, mask = ids.to(self.workspace.device), mask.to(self.workspace.device)
        return Conditions(ids, mask, self.table, slots)

    def _draw(self, stream: Stream, step: int, slots: Tensor) -> Draw:
        return Draw(self.seed, stream, slots, step)

    def _draw_t(self, stream: Stream, step: int, slots: Tensor) -> Tensor:
        t = uniform_integers(self.seed, stream, slots, step, *self.window)
        return t.to(self.workspace.device)

    def _apply_to_generator(self, loss: Tensor, step: int) -> dict[str, float]:
        c, loss = self.config, self.ranks.sum(loss)
        norm = self.guard.apply(
            "generator", loss, self.generator_optimizer, c.clip_norm, c.clip_value
        )
        if norm is None:
            return {}
        self.ema.update(self.generator, step)
        return {"generator_gradient_norm": norm}

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.workspace.device)
