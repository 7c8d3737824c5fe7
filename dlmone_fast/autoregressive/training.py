"""Training of an autoregressive model: resumes by itself, exactly, and ends with a model folder.

RUN/checkpoints/   training checkpoints
RUN/model/         the best weights so far by the validation score, ready to use
RUN/metrics.jsonl
RUN/.lock          held while a training runs here
"""

from __future__ import annotations

import os
import time
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor, nn

from dlmone_fast.autoregressive.config import FREE_KEYS, TrainingConfig
from dlmone_fast.autoregressive.folder import save_model
from dlmone_fast.autoregressive.generation import Autoregressive
from dlmone_fast.autoregressive.journal import Journal
from dlmone_fast.autoregressive.loss import smoothed_cross_entropy
from dlmone_fast.autoregressive.model import EncoderDecoder
from dlmone_fast.autoregressive.precision import WorkingCopy, is_bf16
from dlmone_fast.autoregressive.preparation import Prepared, prepare
from dlmone_fast.autoregressive.scoring import score_symbols, score_texts
from dlmone_fast.config import to_dict
from dlmone_fast.errors import ConfigError, InterruptedAndSavedError
from dlmone_fast.models.checkpoint import (
    Checkpoint,
    load_checkpoint,
    resolve_resume,
    save_checkpoint,
)
from dlmone_fast.models.optimizer_state import flatten_optimizer, restore_optimizer
from dlmone_fast.training.lock import only_training_in
from dlmone_fast.training.loop import reseed_dropout
from dlmone_fast.training.optim import Ema, UpdateGuard, learning_rate, set_learning_rate
from dlmone_fast.training.signals import StopRequest, TimeLimit

_SHOWN = 3
_LOSS_BATCH = 256
_LOW_IS_GOOD = ("wer", "loss")


def train(config: TrainingConfig, started: float | None = None) -> Path:
    """Train to the end, from the newest checkpoint in the run folder if there is one.

    Args:
        config: the training; the same one continues it.
        started: since when `max_minutes` counts, by `time.monotonic()`; None: now.

    Returns:
        The model folder.

    Raises:
        InterruptedAndSavedError: SIGTERM came or the time is up; a checkpoint was saved first.
        ConfigError: the folder holds a run of another configuration, data or start.
        DivergedError: too many steps in a row were not finite.
        DataError, ModelFileError: what is read cannot be used.
    """
    limit = TimeLimit(config.max_minutes, started)
    prepared = prepare(config)
    root = Path(config.output_dir)
    with only_training_in(root), torch.random.fork_rng(devices=[]), StopRequest() as stop:
        training = Training(prepared, root)
        found = resolve_resume(root / "checkpoints")
        if found is not None:
            training.restore(load_checkpoint(found))
        journal = Journal(root, training.step, training.steps, config.log_every)
        try:
            journal.say(training.description(found))
            _loop(training, journal, stop, limit)
        finally:
            journal.close()
    return training.folder


def _loop(training: Training, journal: Journal, stop: StopRequest, limit: TimeLimit) -> None:
    config = training.config
    saved = time.monotonic()
    while training.step < training.steps:
        rows, loss, rate = training.update()
        step = training.step
        journal.advance(step, rows, loss, rate)
        last = step == training.steps
        if step % config.validate_every == 0 or last:
            training.validate(journal)
        stopping = limit.reached() or stop.requested
        if last or stopping or time.monotonic() - saved >= 60 * config.save_minutes:
            training.save()
            saved = time.monotonic()
        if stopping and not last:
            cause = "SIGTERM" if stop.requested else limit
            raise InterruptedAndSavedError(
                f"stopped by {cause} after {step} of {training.steps} steps; saved; the same "
                "command continues"
            )
    training.publish(finished=True)


class Training:
    """Weights, optimiser and average of a training, and its next step."""

    def __init__(self, prepared: Prepared, root: Path) -> None:
        config = prepared.config
        self.config, self.prepared, self.root = config, prepared, root
        self.model = EncoderDecoder(config.model, config.seed)
        if prepared.start is not None:
            from dlmone_fast.autoregressive.start import start_from

            start_from(self.model, prepared.start, prepared.vocabulary.tokenizer)  # type: ignore[union-attr]
        self.model.train()
        self.copy = WorkingCopy(self.model, is_bf16(config.precision))
        self.optimizer = _adamw(self.model, config)
        self.average = Ema(self.model, config.ema_decay, warmup=True)
        self.guard = UpdateGuard(config.max_bad_steps)
        self.step = 0
        self.best: dict[str, Any] = {}
        """Score, its name and step, of the weights in the model folder."""
        self._best_values: dict[str, Tensor] = {}
        self._per_epoch = prepared.train.steps_of_epoch(config.batch_size)
        self._epoch: tuple[int, list[Any]] = (-1, [])
        rows = config.rows or config.epochs * len(prepared.train)
        self.steps = max(1, round(rows / config.batch_size))

    @property
    def folder(self) -> Path:
        """The model folder."""
        return self.root / "model"

    def description(self, resumed: Path | None) -> str:
        """Lines that say what is trained on what."""
        prepared, config = self.prepared, self.config
        size = sum(p.numel() for p in self.model.parameters())
        lines = [
            f"{len(prepared.train):,} pairs (left out: {prepared.dropped}), {self.steps:,} steps "
            f"of {config.batch_size}; {size / 1e6:.2f} M parameters, vocabularies "
            f"{config.model.source_vocab:,} and {config.model.target_vocab:,}, "
            f"{'bf16' if is_bf16(config.precision) else 'fp32'}"
        ]
        if prepared.dropped_valid.any:
            lines.append(
                f"validation pairs left out of the loss: {prepared.dropped_valid}; scored are "
                f"{len(prepared.valid_rows):,} whose sources can be read"
            )
        if resumed is not None:
            lines.append(f"resumed from {resumed}")
        return "\n".join(lines)

    def update(self) -> tuple[int, float, float]:
        """One step: rows of its batch, loss, and learning rate."""
        config, step = self.config, self.step
        batch = self.prepared.train.batch(self._rows(step))
        reseed_dropout(config.seed, step, 0)
        network = self.copy.network
        hidden = network(batch.source, batch.padded, batch.target).flatten(0, 1)
        if batch.places is not None:
            hidden = hidden.index_select(0, batch.places)
        loss = smoothed_cross_entropy(network.logits(hidden), batch.wanted, config.label_smoothing)
        loss.backward()
        self.copy.take_gradients()
        rate = learning_rate(
            config.learning_rate, step, self.steps, config.warmup_steps, config.decay
        )
        set_learning_rate(self.optimizer, rate)
        self.guard.apply("autoregressive", loss.detach(), self.optimizer, config.clip_norm)
        self.copy.refresh()
        self.average.update(self.model, step)
        self.step += 1
        return len(batch.source), float(loss.detach()), rate

    def validate(self, journal: Journal) -> None:
        """Score the average's greedy texts; keep it if it is the best so far."""
        averaged = self._averaged(self.average.values)
        use = Autoregressive(averaged, self.prepared.vocabulary, self.config.precision)
        started = time.monotonic()
        rows = self.prepared.valid_rows
        texts, scores = self._scored(use)
        scores["loss"] = self._loss(averaged)
        scores["validation_seconds"] = time.monotonic() - started
        journal.record(self.step, scores)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        journal.say(f"validation at step {self.step} ({len(rows)} rows): {shown}")
        for row, text in list(zip(rows, texts, strict=True))[:_SHOWN]:
            journal.say(f"    {row.src}  →  {text}")
        name = self.config.selected_by
        value = scores[name]
        low = name in _LOW_IS_GOOD
        if not self.best or ((value < self.best["value"]) == low and value != self.best["value"]):
            self.best = {"score": name, "value": value, "step": self.step}
            self._best_values = {k: v.clone() for k, v in self.average.values.items()}
            self.publish()

    def publish(self, finished: bool = False) -> None:
        """Write the model folder with the best weights so far."""
        config = self.config
        source = {
            "best": self.best,
            "finished": finished,
            "inputs": self.prepared.inputs,
            "training": _kept(config) | {"steps": self.steps},
        }
        save_model(self.folder, config.model, self._best_values, self.prepared.vocabulary, source)

    def save(self) -> None:
        """Write a checkpoint."""
        optimizer, groups = flatten_optimizer(self.optimizer, dict(self.model.named_parameters()))
        tensors = {
            "model": {name: p.detach() for name, p in self.model.named_parameters()},
            "average": self.average.values,
            "best": self._best_values,
            "optimizer": optimizer,
        }
        state = {
            "inputs": self.prepared.inputs,
            "best": self.best,
            "guard": self.guard.state(),
            "optimizer": groups,
        }
        text = tomli_w.dumps(to_dict(self.config))
        save_checkpoint(self.root / "checkpoints", self.step, tensors, state, text)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of this configuration, data and start."""
        _check_same(checkpoint, self.config, self.prepared.inputs)
        checkpoint.check_step(self.steps)
        named = dict(self.model.named_parameters())
        like = {name: p.detach() for name, p in named.items()}
        model = checkpoint.group("model", like)
        self._best_values = checkpoint.group("best", like)
        average = checkpoint.group("average", like)
        restore_optimizer(
            self.optimizer,
            named,
            checkpoint.tensors.get("optimizer", {}),
            checkpoint.value("optimizer", dict),
            checkpoint.path,
        )
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(model[name])
        # The average is updated side by side with the parameters: in their order.
        self.average.values = {name: average[name] for name in named}
        self.guard.restore(checkpoint.value("guard", dict))
        self.best = checkpoint.value("best", dict)
        self.copy.refresh()
        self.step = checkpoint.step

    def _rows(self, step: int) -> Any:
        epoch, place = divmod(step, self._per_epoch)
        if self._epoch[0] != epoch:
            order = self.prepared.train.order(self.config.seed, epoch, self.config.batch_size)
            self._epoch = epoch, order
        return self._epoch[1][place]

    def _scored(self, use: Autoregressive) -> tuple[list[str], dict[str, float]]:
        rows, vocabulary = self.prepared.valid_rows, self.prepared.vocabulary
        texts = use.generate([row.src for row in rows], on_overflow="truncate")
        assert isinstance(texts, list)
        if vocabulary.kind == "symbols":
            return texts, score_symbols(texts, rows)
        sources = [vocabulary.normal(row.src) for row in rows]
        references = [vocabulary.normal(row.trg) for row in rows]
        return texts, score_texts(texts, sources, references)

    @torch.no_grad()
    def _loss(self, averaged: EncoderDecoder) -> float:
        """Mean cross-entropy of a token of the validation pairs, without smoothing."""
        total, count = 0.0, 0
        for batch in self.prepared.valid.in_order(_LOSS_BATCH):
            hidden = averaged(batch.source, batch.padded, batch.target).flatten(0, 1)
            if batch.places is not None:
                hidden = hidden.index_select(0, batch.places)
            logits = averaged.logits(hidden).float()
            total += float(nn.functional.cross_entropy(logits, batch.wanted, reduction="sum"))
            count += len(batch.wanted)
        return total / count

    def _averaged(self, values: dict[str, Tensor]) -> EncoderDecoder:
        model = EncoderDecoder(self.config.model).eval().requires_grad_(False)
        for name, p in model.named_parameters():
            p.copy_(values[name])
        return model


def _adamw(model: EncoderDecoder, config: TrainingConfig) -> torch.optim.AdamW:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, free = [], []
    for p in model.parameters():
        (decayed if p.dim() > 1 and id(p) not in tables else free).append(p)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    betas = config.beta1, config.beta2
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def _kept(config: TrainingConfig) -> dict[str, Any]:
    """The configuration without what may change between two starts."""
    return {k: v for k, v in to_dict(config).items() if k not in FREE_KEYS}


def _check_same(checkpoint: Checkpoint, config: TrainingConfig, inputs: dict[str, str]) -> None:
    before: Any = tomllib.loads(checkpoint.config_text)
    now = _kept(config)
    changed = [
        f"{name}: {before.get(name)!r} there, {value!r} now"
        for name, value in now.items()
        if before.get(name) != value
    ]
    found = checkpoint.state.get("inputs")
    changed += [
        f"another {name}"
        for name, digest in inputs.items()
        if not isinstance(found, dict) or found.get(name) != digest
    ]
    if changed:
        raise ConfigError(
            f"{os.fspath(checkpoint.path)}: is of another training ({'; '.join(changed[:5])}); "
            "name the same data, start and settings, or use another --output-dir"
        )
