"""Every key of the configuration: its type, and its bounds if it is a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from dlmone_fast.config import PRESETS

_STAGE = {
    "steps": (1, 10_000_000),
    "batch_size": (1, 1 << 20),
    "micro_batch_size": (1, 1 << 20),
    "mu": (-4, 4),
    "dsm_weight": (0, 1e6),
    "score_adversarial_weight": (0, 1e6),
    "sid_weight": (0, 1e6),
    "generator_adversarial_weight": (0, 1e6),
    "score_learning_rate": (0, 1),
    "generator_learning_rate": (0, 1),
    "sid_scale": (0, 1e6),
    "adversarial_scale": (0, 1e6),
    "score_steps": (1, 100),
    "score_warmup_steps": (0, 10_000_000),
    "few_steps": (1, 64),
    "anchor_steps": (0, 10_000_000),
    "anchor_weight": (0, 1e6),
    "anchor_decay_steps": (0, 10_000_000),
    "anchor_learning_rate": (0, 1),
    "anchor_mse_weight": (0, 1e6),
    "adversarial_warmup_steps": (0, 10_000_000),
    "beta1": (0, 0.999999),
    "beta2": (0, 0.999999),
    "weight_decay": (0, 1),
    "clip_value": (0, 1e6),
    "clip_norm": (0, 1e6),
    "ema_decay": (0, 0.999999),
    "weight_floor": (0, 1),
    "validate_every": (1, 10_000_000),
    "save_every": (1, 10_000_000),
}
BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "log_every": (1, 1_000_000),
    "max_bad_steps": (1, 1_000_000),
    "max_minutes": (0, 1e6),
    "rank_minutes": (0.01, 1e4),
    "model.seq_len": (8, 4096),
    "model.vocab_size": (0, 1 << 20),
    "model.embedding_dim": (4, 8192),
    "model.time_dim": (4, 8192),
    "model.hidden_size": (4, 8192),
    "model.num_layers": (1, 128),
    "model.num_heads": (1, 128),
    "model.ffn_size": (4, 1 << 16),
    "model.dropout": (0, 0.9),
    "model.source_positions": (0, 126),
    "model.source_window": (1, 31),
    "model.max_positions": (128, 1 << 16),
    "model.noise_scale": (0.1, 16),
    "diffusion.num_timesteps": (21, 100_000),
    "data.vocab_size": (64, 1 << 18),
    "data.max_chars": (1, 10_000_000),
    "data.max_source_tokens": (0, 4096),
    "data.prune_below": (1, 1_000_000),
    "data.train_rows": (100, 5_000_000),
    "teacher.steps": (1, 10_000_000),
    "teacher.batch_size": (1, 1 << 20),
    "teacher.micro_batch_size": (1, 1 << 20),
    "teacher.learning_rate": (0, 1),
    "teacher.warmup_steps": (0, 50_000),
    "teacher.beta1": (0, 0.999999),
    "teacher.beta2": (0, 0.999999),
    "teacher.weight_decay": (0, 1),
    "teacher.clip_norm": (0, 1e6),
    "teacher.ema_decay": (0, 0.999999),
    "teacher.mse_weight": (0, 1e6),
    "teacher.decoder_weight": (0, 1e6),
    "teacher.prior_weight": (0, 1e6),
    "teacher.anchor_weight": (0, 1e6),
    "teacher.log_snr_offset": (-20, 20),
    "teacher.log_snr_scale": (0.01, 20),
    "teacher.log_snr_uniform_share": (0, 1),
    "teacher.pure_noise_share": (0, 1),
    "teacher.pad_weight": (0, 1),
    "teacher.condition_dropout": (0, 1),
    "teacher.self_conditioning_share": (0, 1),
    "teacher.save_every": (1, 10_000_000),
    "teacher.validate_every": (1, 10_000_000),
    "distill.t_init": (1, 100_000),
    "distill.t_min": (0, 100_000),
    "distill.t_max": (0, 100_000),
    "distill.decodable_margin": (0, 20),
    "distill.temperature": (0, 10),
    "distill.pad_weight": (0, 1),
    "distill.pairs.count": (0, 100_000_000),
    "distill.pairs.per_source": (1, 1 << 20),
    "distill.pairs.steps": (1, 100_000),
    "distill.pairs.temperature": (0, 10),
    "distill.pairs.batch_size": (1, 1 << 20),
    "distill.pairs.save_every": (1, 10_000_000),
    "distill.logit_clamp": (0, 1000),
    "distill.selection_max_self_bleu": (0, 1),
    "distill.validation_rows": (1, 1_000_000),
    "distill.diagnose_every": (1, 10_000_000),
    **{
        f"distill.{s}.{key}": bounds for s in ("stage1", "stage2") for key, bounds in _STAGE.items()
    },
    "evaluation.rows": (1, 10_000_000),
    "evaluation.teacher_rows": (1, 10_000_000),
    "evaluation.candidates": (1, 64),
    "evaluation.batch_size": (1, 4096),
    "evaluation.bootstrap": (0, 100_000),
}


def leaves(section: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}{item.name}.")
        else:
            yield f"{path}{item.name}", value


KINDS = {path: type(value) for path, value in leaves(PRESETS["qqp"])}


# For each key that is a choice of words, one that is none of them.
WRONG_WORDS = {
    "model.norm": "Pre",
    "diffusion.schedule": "sqrtt",
    "data.task": "qpq",
    "data.tokenizer": "bpe",
    "data.strip_accents": "yes",
    "teacher.decay": "exponential",
    "teacher.timestep_sampler": "loss",
    "teacher.mse_target": "x0",
    "teacher.mse_positions": "source",
    "distill.discriminator": "mean",
    "distill.selection_metric": "rouge",
    "distill.stage1.form": "SiD",
    "distill.stage2.decay": "",
    "distill.pairs.sampler": "ancestral",
    "precision": "fp16",
}


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value
