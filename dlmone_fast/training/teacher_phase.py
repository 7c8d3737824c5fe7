"""Training of the teacher φ (DiffuSeq, arXiv 2210.08933, or its anchored variant)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.config import Config
from dlmone_fast.data.batches import (
    BatchStream,
    IntArray,
    lengths_for,
    training_batch,
    without_sources,
)
from dlmone_fast.diffusion import (
    Draw,
    LogSnrTimesteps,
    LossAwareTimesteps,
    Schedule,
    TimestepSampler,
    UniformTimesteps,
    critical_log_snr,
)
from dlmone_fast.errors import CheckpointError
from dlmone_fast.kernels.noise import Stream, random_bits
from dlmone_fast.losses.teacher import teacher_loss
from dlmone_fast.models.checkpoint import MAX_STEP, STATE_NAME, Checkpoint, is_count
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.models.optimizer_state import flatten_optimizer, restore_optimizer
from dlmone_fast.models.pretrained import read_pretrained
from dlmone_fast.networks import DiffusionLM
from dlmone_fast.tokenizer import Tokenizer
from dlmone_fast.training.loop import State, phase_seed, reseed_dropout
from dlmone_fast.training.optim import Ema, UpdateGuard, adamw, learning_rate, set_learning_rate
from dlmone_fast.training.progress import Progress
from dlmone_fast.training.start import start_from
from dlmone_fast.training.validation import Validator, validation_loss
from dlmone_fast.training.workspace import Workspace


class TeacherPhase:
    """The teacher's weights, optimiser, moving average and draws of t."""

    name = "teacher"

    def __init__(self, workspace: Workspace, inputs: dict[str, str]) -> None:
        self.inputs = inputs
        self.workspace = workspace
        self.config = workspace.config.teacher
        self.steps, self.save_every = self.config.steps, self.config.save_every
        self.validate_every, self.batch_size = self.config.validate_every, self.config.batch_size
        self.seed = phase_seed(workspace.config.seed, 0)
        self.schedule = Schedule(workspace.config.diffusion)
        self.lm = new_network(workspace)
        if workspace.config.compile:
            self.lm.backbone.compile()
        c = self.config
        self.optimizer = adamw(self.lm, c.learning_rate, c.beta1, c.beta2, c.weight_decay)
        self.ema = Ema(self.lm, c.ema_decay, c.ema_warmup)
        self.guard = UpdateGuard(workspace.config.max_bad_steps, self.lm.parameters())
        self.timesteps = _timesteps(workspace.config, self.schedule)
        self.cache = workspace.cache("train")
        self.stream = BatchStream(
            self.cache, self.seed, c.batch_size, lengths=lengths_for(self.cache, self.lm.config)
        )
        self.validator = Validator(workspace)
        self.ranks = workspace.ranks
        # Not every pass gives the network an estimate to read.
        all_used = not workspace.config.model.self_conditioning
        self.shared = self.ranks.loss_of(self.lm, all_used)

    def update(self, step: int) -> dict[str, float]:
        c, total = self.config, torch.zeros(())
        rate = learning_rate(c.learning_rate, step, c.steps, c.warmup_steps, c.decay)
        set_learning_rate(self.optimizer, rate)
        self.lm.train()
        rows = self.stream.batch_rows(step)
        drawn: list[tuple[Tensor, Tensor]] = []
        sums = {"mse": 0.0, "nll": 0.0}
        parts = self.ranks.slots(len(rows)).split(c.micro_batch_size)
        for index, slots in enumerate(parts):
            reseed_dropout(self.seed, step, self.ranks.micro_batch(index))
            t, weight = self.timesteps.sample(self.seed, step, slots)
            loss, terms = self.shared.backward(
                partial(self._loss, rows, t, weight, step, slots), last=index == len(parts) - 1
            )
            drawn.append((t, terms["loss"]))
            total = total.to(loss.device) + loss
            for name in sums:
                sums[name] += float(terms[name].sum())
        total = self.ranks.sum(total)
        norm = self.guard.apply("teacher", total, self.optimizer, c.clip_norm)
        if norm is not None:
            self.ema.update(self.lm, step)
            self._learn_timesteps(drawn)
        means = {name: v / len(rows) for name, v in self.ranks.sum_values(sums).items()}
        return {"loss": float(total), **means, "learning_rate": rate, **self._gradient(norm)}

    def _loss(
        self, rows: IntArray, t: Tensor, weight: Tensor, step: int, slots: Tensor
    ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        """The share of these slots in the batch's mean loss; the same detached, and each row's
        terms."""
        terms = self.terms(rows[slots.numpy()], t, step, slots)
        loss = (terms["loss"] * weight.to(terms["loss"].device)).sum() / len(rows)
        told = {name: value.detach() for name, value in terms.items()}
        return loss, (loss.detach(), told)

    def _learn_timesteps(self, drawn: list[tuple[Tensor, Tensor]]) -> None:
        """Tell the sampler of t, if it learns, what each draw cost, in the order of the slots."""
        if self.timesteps.state():
            t, losses = (torch.cat(values).cpu() for values in zip(*drawn, strict=True))
            self.timesteps.update(self.ranks.gather_rows(t), self.ranks.gather_rows(losses))

    def _gradient(self, norm: float | None) -> dict[str, float]:
        skipped = {"skipped": float(self.guard.skipped)} if self.guard.skipped else {}
        return skipped if norm is None else {"gradient_norm": norm, **skipped}

    def terms(self, rows: Any, t: Tensor, step: int, slots: Tensor) -> dict[str, Tensor]:
        """Loss terms of rows of the training cache, with noise of (seed, step, slot)."""
        c, device, tokenizer = self.config, self.workspace.device, self.workspace.tokenizer
        sizes = self.lm.config
        ids, mask = training_batch(self.cache, rows, sizes, tokenizer)
        if c.condition_dropout:
            dropped = self._share(c.condition_dropout, Stream.CONDITION_DROPOUT, step, slots)
            ids = without_sources(ids, dropped, tokenizer.pad_id, tokenizer.sep_id)
        with_estimate = None
        if self.lm.config.self_conditioning:
            share = c.self_conditioning_share
            with_estimate = self._share(share, Stream.SELF_CONDITIONING, step, slots)
        ids, mask, t = ids.to(device), mask.to(device), t.to(device)
        noise = Draw(self.seed, Stream.TEACHER_NOISE, slots, step)
        start = Draw(self.seed, Stream.EMBEDDING_NOISE, slots, step)
        with autocast(self.workspace):
            return teacher_loss(
                self.lm, self.schedule, c, ids, mask, t, noise, start,
                tokenizer.pad_id, with_estimate,
            )  # fmt: skip

    def _share(self, share: float, stream: Stream, step: int, slots: Tensor) -> Tensor:
        """Places [n] among the slots [B] of a random share, each slot's choice its own."""
        bits = random_bits(self.seed, stream, slots, step, 0)
        return (bits < share * 2**32).nonzero().squeeze(1)

    def averaged(self) -> Denoiser:
        """The moving average of the teacher, ready to use until the next update."""
        lm = DiffusionLM.from_tensors(self.lm.config, self.ema.values)
        return Denoiser(lm, self.schedule).eval().requires_grad_(False)

    def validate(self, step: int, progress: Progress) -> None:
        if step == 0:
            return
        denoiser = self.averaged()
        loss = validation_loss(self.workspace, denoiser, self.config)
        progress.record(step, {f"valid_{name}": value for name, value in loss.items()})
        self.validator.show_samples(denoiser, "teacher", step, progress)

    def state(self) -> State:
        moments, optimizer = flatten_optimizer(self.optimizer, dict(self.lm.named_parameters()))
        tensors = {"model": dict(self.lm.state_dict()), "ema": self.ema.values}
        tensors["optimizer"] = moments
        if self.timesteps.state():
            tensors["timesteps"] = self.timesteps.state()
        return tensors, {"optimizer": optimizer, **self.guard.state()}

    def restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.check_step(self.steps)
        weights = checkpoint.group("model", self.lm.state_dict())
        average = checkpoint.group("ema", self.ema.values)
        timesteps = checkpoint.group("timesteps", self.timesteps.state())
        counts = guard_counts(checkpoint)
        restore_optimizer(
            self.optimizer,
            dict(self.lm.named_parameters()),
            checkpoint.tensors.get("optimizer", {}),
            checkpoint.value("optimizer", dict),
            checkpoint.path / "optimizer.safetensors",
        )
        self.lm.load_state_dict(weights)
        for name, value in self.ema.values.items():
            value.copy_(average[name])
        self.timesteps.restore(timesteps)
        self.guard.restore(counts)


def guard_counts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `UpdateGuard.restore` reads, checked."""
    in_a_row = checkpoint.value("bad_in_a_row", dict, default={})
    skipped = checkpoint.value("skipped", int)
    for name, counts in {"skipped": [skipped], "bad_in_a_row": in_a_row.values()}.items():
        if not all(map(is_count, counts)):
            raise CheckpointError(
                f"{checkpoint.path / STATE_NAME}: {name} must be whole numbers between 0 and "
                f"{MAX_STEP}, got {checkpoint.state[name]!r:.80}; resume from another checkpoint"
            )
    return {"skipped": skipped, "bad_in_a_row": in_a_row}


def new_network(workspace: Workspace) -> DiffusionLM:
    """A network initialised from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(workspace.config.seed % (1 << 63))
        # A folder of this machine has no place in the model's own.
        lm = DiffusionLM(replace(workspace.config.model, start_from=""))
    if workspace.config.model.start_from:
        assert isinstance(workspace.tokenizer, Tokenizer)
        start_from(lm, read_pretrained(workspace.config.model.start_from), workspace.tokenizer)
    return lm.to(workspace.device)


def autocast(workspace: Workspace) -> torch.autocast:
    """The run's precision as a context for forward passes; weights stay float32."""
    return torch.autocast(workspace.device.type, torch.bfloat16, enabled=workspace.bf16)


def _timesteps(config: Config, schedule: Schedule) -> TimestepSampler:
    c, model = config.teacher, config.model
    if c.timestep_sampler == "uniform":
        return UniformTimesteps(schedule.num_timesteps)
    if c.timestep_sampler == "loss-aware":
        return LossAwareTimesteps(schedule.num_timesteps)
    critical = critical_log_snr(model.embedding_dim, model.vocab_size, model.noise_scale)
    location = c.log_snr_offset - critical
    shares = c.log_snr_uniform_share, c.pure_noise_share
    return LogSnrTimesteps(schedule, location, c.log_snr_scale, *shares)
