"""What a run will cost, from its configuration alone: the text of `train --dry-run`.

Networks are counted on torch's meta device: nothing is allocated, read or written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dlmone_fast.config import Config, ModelConfig, StageConfig
from dlmone_fast.networks import DiffusionLM, ScoreEstimator
from dlmone_fast.networks.layers import count_parameters
from dlmone_fast.tasks import grammar
from dlmone_fast.text_tokenizer import SPECIAL_TOKENS
from dlmone_fast.training.window import timestep_window

_FP32 = 4


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: embedding with decoder bias, backbone f, and ψ's own head."""

    tokens: int
    backbone: int
    head: int

    @property
    def model(self) -> int:
        """What a model folder stores: φ, or θ with the shared embedding."""
        return self.tokens + self.backbone


def count(config: Config) -> Parameters:
    """Count the parameters of a configuration whose vocabulary size is known."""
    with torch.device("meta"):
        lm = DiffusionLM(config.model)
        score = ScoreEstimator(lm.backbone, config.distill.discriminator)
    backbone = count_parameters(lm.backbone)
    return Parameters(count_parameters(lm.tokens), backbone, count_parameters(score) - backbone)


def known_vocabulary(config: Config) -> int:
    """The vocabulary size without reading data: configured, generated, or yet to be learned."""
    if config.model.vocab_size:
        return config.model.vocab_size
    if config.is_grammar:
        return len(SPECIAL_TOKENS) + len(grammar.vocabulary(config.data.task))
    return config.data.vocab_size


def forward_flops(model: ModelConfig) -> int:
    """FLOPs of one backbone call on one row, two for each multiply-add of its products.

    With L positions, width H, feed-forward F, N layers, embedding d and time width τ:
    2 · [L · (dH + H² + N · (4H² + 2HF + 2LH) + H² + Hd) + 4τ² + 4τH].
    Element-wise work is left out.
    """
    length, h, d, tau = model.seq_len, model.hidden_size, model.embedding_dim, model.time_dim
    layer = 4 * h * h + 2 * h * model.ffn_size + 2 * length * h
    position = 2 * d * h + 2 * h * h + model.num_layers * layer
    return 2 * (length * position + 4 * tau * tau + 4 * tau * h)


def decoder_flops(model: ModelConfig) -> int:
    """FLOPs of one decoder call h·Eᵀ on every position of one row: 2 · L · V · d."""
    return 2 * model.seq_len * model.vocab_size * model.embedding_dim


def teacher_step_flops(config: Config) -> int:
    """FLOPs of one teacher update: forward and backward (twice the forward) of f.

    The decoder runs on x̂0's target positions (taken as all: an upper bound), with a backward pass
    where the anchor loss is on, and on x_0 where `decoder_weight` is, with a backward pass.
    Self-conditioning adds `estimate_flops`.
    """
    decoder = decoder_flops(config.model)
    calls = (3 if config.teacher.anchor_weight else 1) + (3 if config.teacher.decoder_weight else 0)
    network = 3 * forward_flops(config.model) + estimate_flops(config)
    return config.teacher.batch_size * (network + calls * decoder)


def estimate_flops(config: Config) -> int:
    """FLOPs on a row that self-conditioning adds to a teacher update, on average.

    A forward pass for the share of rows that get an estimate, and for all rows the projection of
    what they are given, forward and to its weights: 2 · 2 · L · dH.
    """
    model = config.model
    if not model.self_conditioning:
        return 0
    first = config.teacher.self_conditioning_share * forward_flops(model)
    return round(first) + 4 * model.seq_len * model.embedding_dim * model.hidden_size


def score_step_flops(model: ModelConfig, stage: StageConfig) -> int:
    """FLOPs of one ψ update, in forward passes of a row: θ 1, and with `few_steps` K (K - 1) / 2
    more on average; ψ on generated text 3 (forward, and backward twice that), and 3 on real text
    where the discriminator is trained."""
    passes = 7 if stage.score_adversarial_weight else 4
    return stage.batch_size * (2 * passes + stage.few_steps - 1) * forward_flops(model) // 2


def generator_step_flops(model: ModelConfig, stage: StageConfig) -> int:
    """FLOPs of one θ update, in forward passes of a row: θ 3, and with `few_steps` K (K - 1) / 2
    more on average; φ and ψ 2 each, because frozen networks need the gradient of their input only,
    as dear as one forward pass."""
    return stage.batch_size * (14 + stage.few_steps - 1) * forward_flops(model) // 2


def anchor_step_flops(model: ModelConfig, stage: StageConfig) -> int:
    """FLOPs of the anchor loss of one update: forward and backward of θ and of the decoder, whose
    table is frozen (taken on all positions: an upper bound)."""
    return stage.batch_size * (3 * forward_flops(model) + 2 * decoder_flops(model))


def pair_flops(config: Config) -> int:
    """FLOPs of one paired endpoint: the teacher's calls, and the rounding of the last one."""
    model = config.model
    return config.distill.pairs.steps * forward_flops(model) + decoder_flops(model)


def pair_bytes(model: ModelConfig) -> int:
    """Bytes of one stored pair: row, number of the noise, and ids of 16 bits if they suffice."""
    return 8 + model.seq_len * (2 if model.vocab_size <= 1 << 16 else 4)


def activation_bytes(model: ModelConfig, rows: int, element: int) -> int:
    """Bytes that one forward pass of `rows` rows keeps for its backward pass, estimated.

    rows · L · [N · (10H + 2F) + 4H] elements: per layer the inputs and outputs of both LayerNorms
    (4H), q, k, v and their mixture (4H), dropout masks (2H) and both sides of the GELU (2F), with
    attention that never stores its L² weights; 4H for the projections.
    """
    layer = 10 * model.hidden_size + 2 * model.ffn_size
    per_position = model.num_layers * layer + 4 * model.hidden_size
    return rows * model.seq_len * per_position * element


def teacher_bytes(config: Config, counted: Parameters) -> dict[str, int]:
    """Estimated peak memory of teacher training by part; "logits" counts scores and gradients."""
    rows = min(config.teacher.micro_batch_size, config.teacher.batch_size)
    p, model = _FP32 * counted.model, config.model
    decoders = bool(config.teacher.anchor_weight) + bool(config.teacher.decoder_weight)
    logits = 2 * _FP32 * rows * model.seq_len * model.vocab_size * max(1, decoders)
    activations = activation_bytes(model, rows, _element(config))
    return {
        "weights": p, "gradients": p, "Adam": 2 * p, "EMA": p,
        "activations": activations, "logits": logits,
    }  # fmt: skip


def stage_bytes(config: Config, counted: Parameters, stage: StageConfig) -> dict[str, int]:
    """Estimated peak memory of a stage by part.

    Weights: φ, θ, ψ and the best student so far, beside the shared embedding. Activations: the
    largest update, which is θ's, runs through θ, φ and ψ. Logits: those of the anchor loss.
    """
    backbone, score = _FP32 * counted.backbone, _FP32 * (counted.backbone + counted.head)
    rows, model = min(stage.micro_batch_size, stage.batch_size), config.model
    logits = 2 * _FP32 * rows * model.seq_len * model.vocab_size if stage.anchored else 0
    return {
        "weights": _FP32 * counted.tokens + 3 * backbone + score,
        "gradients": backbone + score,
        "Adam": 2 * (backbone + score),
        "EMA": backbone,
        "activations": 3 * activation_bytes(model, rows, _element(config)),
        **({"logits": logits} if logits else {}),
    }


def checkpoint_bytes(counted: Parameters) -> dict[str, int]:
    """Bytes of one training checkpoint by phase, and of a model folder.

    Teacher: weights, EMA and two Adam moments. A stage: θ, its EMA, the best student, ψ, and two
    moments for each of θ and ψ; before θ's first update its moments are not there yet.
    """
    backbone, score = _FP32 * counted.backbone, _FP32 * (counted.backbone + counted.head)
    return {
        "teacher": 4 * _FP32 * counted.model,
        "stage": 5 * backbone + 3 * score,
        "model folder": _FP32 * counted.model,
    }


def describe(config: Config) -> str:
    """Parameters, FLOPs, memory, steps and disk of a run, without data or side effects."""
    config = replace(config, model=replace(config.model, vocab_size=known_vocabulary(config)))
    counted = count(config)
    lines = [f"preset {config.preset}, task {config.data.task}", ""]
    lines += [*_parameter_lines(config, counted), "", *_teacher_lines(config, counted)]
    if config.distill.pairs.count:
        lines += ["", *_pair_lines(config)]
    for name in ("stage1", "stage2"):
        lines += ["", *_stage_lines(config, counted, name, getattr(config.distill, name))]
    sizes = checkpoint_bytes(counted)
    lines += [
        "",
        f"disk         a checkpoint: teacher {_bytes(sizes['teacher'])}, stage "
        f"{_bytes(sizes['stage'])} (the newest two of a phase are kept); a model folder: "
        f"{_bytes(sizes['model folder'])}",
        "FLOPs are 2 per multiply-add of matrix products; memory is an estimate, without the "
        "framework's own.",
    ]
    return "\n".join(lines)


def _parameter_lines(config: Config, counted: Parameters) -> list[str]:
    model = config.model
    return [
        f"model        {model.num_layers} layers of width {model.hidden_size}, {model.num_heads} "
        f"heads, embedding width {model.embedding_dim}, vocabulary {model.vocab_size:,}, "
        f"{model.seq_len} positions",
        f"parameters   teacher φ {counted.model:,} (embedding and decoder {counted.tokens:,}, "
        f"backbone {counted.backbone:,})",
        f"             generator θ {counted.model:,} (shares φ's frozen embedding; trains "
        f"{counted.backbone:,})",
        f"             score estimator ψ {counted.backbone + counted.head:,} (backbone, "
        f"discriminator head {counted.head:,})",
        f"one call     {_flops(forward_flops(model))} per text",
    ]


def _teacher_lines(config: Config, counted: Parameters) -> list[str]:
    c = config.teacher
    flops = teacher_step_flops(config)
    first = estimate_flops(config)
    share = f" (self-conditioning {c.batch_size * first / flops:.0%})" if first else ""
    return [
        f"teacher      {c.steps:,} steps of {c.batch_size:,} rows (micro-batches of "
        f"{c.micro_batch_size}): {c.steps * c.batch_size:,} samples seen",
        f"  FLOPs      {_flops(flops)} per step{share}, {_flops(flops * c.steps)} in all",
        f"  memory     {_parts(teacher_bytes(config, counted))}",
    ]


def _pair_lines(config: Config) -> list[str]:
    c, flops = config.distill.pairs, pair_flops(config)
    return [
        f"pairs        {c.count:,} paired endpoints, {c.per_source:,} a source row, {c.steps} "
        f"teacher calls each ({c.sampler}): {c.updates:,} updates of {c.batch_size:,}",
        f"  FLOPs      {_flops(flops)} per pair, {_flops(flops * c.count)} in all",
        f"  disk       {_bytes(c.count * pair_bytes(config.model))} a checkpoint",
    ]


def _stage_lines(config: Config, counted: Parameters, name: str, c: StageConfig) -> list[str]:
    score_updates = c.score_warmup_steps + c.steps * c.score_steps
    score = score_step_flops(config.model, c)
    generator = generator_step_flops(config.model, c)
    total = score * score_updates + generator * c.steps
    anchored = c.anchor_steps + c.anchored_updates
    anchor = anchor_step_flops(config.model, c)
    total += anchor * anchored
    low, high = timestep_window(config)
    lines = [
        f"{name:<12} {c.steps:,} θ and {score_updates:,} ψ steps of {c.batch_size:,} rows "
        f"(micro-batches of {c.micro_batch_size}): {c.steps * c.batch_size:,} samples seen by θ, "
        f"{score_updates * c.batch_size:,} by ψ",
        f"  FLOPs      ψ {_flops(score)}, θ {_flops(generator)} per step, {_flops(total)} in all",
        f"  memory     {_parts(stage_bytes(config, counted, c))}",
    ]
    if anchored:
        lines.insert(
            1,
            f"  anchor     {c.anchor_steps:,} updates of θ on pairs before, {c.anchored_updates:,} "
            f"θ steps with pairs beside: {_flops(anchor)} each",
        )
    if (low, high) != (config.distill.t_min, config.distill.t_max):
        lines.insert(1, f"  t          from [{low}, {high})")
    return lines


def _element(config: Config) -> int:
    # precision = auto is not asked of the device here; fp32 is the safe answer.
    return 2 if config.precision == "bf16" else _FP32


def _parts(parts: dict[str, int]) -> str:
    listed = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    return f"{_bytes(sum(parts.values()))}: {listed}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _flops(number: float) -> str:
    for unit in ("", "K", "M", "G", "T", "P", "E"):
        if number < 1000:
            return f"{number:.3g} {unit}FLOP"
        number /= 1000
    return f"{number:.3g} ZFLOP"
