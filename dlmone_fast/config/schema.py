"""The configuration: frozen dataclasses that check themselves.

Every field is a plain value, so that a configuration is a TOML file and a TOML file is a
configuration. "Off" is 0 or an empty string: TOML has no null. Sources of the defaults: DiffuSeq's
released `config.json` and `train.sh` for the teacher, DLM-One (arXiv 2506.00290) Table 5 for the
two stages; what the paper leaves open follows SiD-family code (see docs/distillation.md).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from dlmone_fast.errors import ConfigError

_checks_enabled = contextvars.ContextVar("config_checks_enabled", default=True)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Build configuration objects without checking them, to check the merged result once."""
    token = _checks_enabled.set(False)
    try:
        yield
    finally:
        _checks_enabled.reset(token)


class Section:
    """A part of the configuration that checks its own fields when it is built."""

    def __post_init__(self) -> None:
        if _checks_enabled.get():
            _check_types(self)
            self.check()

    def check(self) -> None:
        """Raise ConfigError, starting with the field's name, for a value that cannot be used."""


def _check_types(section: Section) -> None:
    for item in dataclasses.fields(section):  # type: ignore[arg-type]
        value, kind = getattr(section, item.name), item.type
        if kind == "float" and type(value) in (int, float):
            # The comparison also refuses NaN, and whole numbers beyond a float's range.
            if not abs(value) <= sys.float_info.max:
                raise ConfigError(f"{item.name} must be finite, got {value!r:.40}")
            object.__setattr__(section, item.name, float(value))
        elif kind in _PLAIN and type(value) is not _PLAIN[kind]:
            raise ConfigError(f"{item.name} must be {_KIND_NAMES[kind]}, got {value!r}")


_PLAIN: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
_KIND_NAMES = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "a boolean"}


def _within(section: Section, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not low <= value <= high:
            raise ConfigError(f"{name} must be between {low:g} and {high:g}, got {value!r}")


def _one_of(section: Section, choices: tuple[str, ...], *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


@dataclass(frozen=True)
class ModelConfig(Section):
    """The one backbone f(x_t, t); the defaults are DiffuSeq's BERT-base shape."""

    seq_len: int = 128
    """Positions of source and target together."""
    vocab_size: int = 0
    """Vocabulary size V; 0: taken from the tokenizer."""
    embedding_dim: int = 128
    """Width d of the token embedding, the space that is diffused."""
    time_dim: int = 128
    """Width of the sinusoidal time embedding."""
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_size: int = 3072
    dropout: float = 0.1
    max_positions: int = 512
    """Rows of the learned position table."""
    norm: str = "post"
    """Place of LayerNorm in a block: post (BERT, DiffuSeq) or pre."""
    normalize_embedding: bool = False
    """Scale every embedding row to norm sqrt(d) before dividing by noise_scale."""
    noise_scale: float = 1.0
    """Noise-scale factor F: embeddings are divided by F, so unit noise weighs F times more."""
    self_conditioning: bool = False
    """A teacher also reads its own last prediction of x_0, through a projection of its own."""

    def check(self) -> None:
        _within(self, 8, 4096, "seq_len")
        _within(self, 0, 1 << 20, "vocab_size")
        _within(self, 4, 8192, "embedding_dim", "time_dim", "hidden_size")
        _within(self, 1, 128, "num_layers", "num_heads")
        _within(self, 4, 1 << 16, "ffn_size")
        _within(self, 0, 0.9, "dropout")
        _within(self, self.seq_len, 1 << 16, "max_positions")
        _within(self, 0.1, 16, "noise_scale")
        _one_of(self, ("post", "pre"), "norm")
        for name in ("embedding_dim", "time_dim"):
            if getattr(self, name) % 2:
                raise ConfigError(f"{name} must be even, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"num_heads must divide hidden_size ({self.hidden_size}), got {self.num_heads}"
            )


SCHEDULES = ("sqrt", "linear", "cosine", "trunc_cos", "trunc_lin", "pw_lin")


@dataclass(frozen=True)
class DiffusionConfig(Section):
    """Forward diffusion; the defaults are DiffuSeq's."""

    schedule: str = "sqrt"
    num_timesteps: int = 2000
    rescale_timesteps: bool = True
    """Feed the network t * 1000 / T instead of t."""

    def check(self) -> None:
        _one_of(self, SCHEDULES, "schedule")
        # With 20 steps or fewer the last beta of the linear schedules is 1 or more.
        _within(self, 21, 100_000, "num_timesteps")


@dataclass(frozen=True)
class DataConfig(Section):
    """Where text comes from and how it becomes tokens."""

    task: str = "custom"
    """Task name: grammar, grammar-templates (both generated here), qqp, quasar-t, wiki-auto or
    custom. Decides which published rows a report shows; the files come from --data-dir."""
    vocab_file: str = ""
    """WordPiece vocabulary, one piece a line, relative to the working folder, the data folder or
    its parent; empty: learn one on the training split."""
    vocab_size: int = 8000
    """Size of a learned vocabulary."""
    lowercase: bool = True
    max_chars: int = 20_000
    """Longest text in characters, checked before tokenising."""
    max_source_tokens: int = 0
    """Longest source in tokens with [CLS] and [SEP] at inference; 0: half of seq_len."""
    train_rows: int = 60_000
    """Rows of the generated grammar tasks' training split."""
    both_directions: bool = False
    """Train on every row twice, the second time with source and target exchanged."""

    def check(self) -> None:
        tasks = ("grammar", "grammar-templates", "qqp", "quasar-t", "wiki-auto", "custom")
        _one_of(self, tasks, "task")
        _within(self, 64, 1 << 18, "vocab_size")
        _within(self, 1, 10_000_000, "max_chars")
        _within(self, 0, 4096, "max_source_tokens")
        _within(self, 100, 5_000_000, "train_rows")


@dataclass(frozen=True)
class TeacherConfig(Section):
    """Training of the teacher φ; the defaults are DiffuSeq's loss, optimiser and schedule."""

    steps: int = 50_000
    batch_size: int = 2048
    micro_batch_size: int = 64
    """Rows per forward pass; gradients of a batch are accumulated over its micro-batches."""
    learning_rate: float = 1e-4
    decay: str = "linear"
    """Learning-rate decay to zero: linear, cosine, or constant."""
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    """Let the average follow faster at first: decay min(ema_decay, (1 + k) / (10 + k)), step k."""
    timestep_sampler: str = "loss-aware"
    """How t is drawn: uniform, loss-aware (DiffuSeq's importance sampler), or log-snr: most often
    where tokens become undecodable without their context, which changes the objective's weights."""
    log_snr_offset: float = 1.15
    """log-snr: location of the draws, in nats of noise beyond the threshold of decodability."""
    log_snr_scale: float = 0.85
    """log-snr: scale of the Gumbel distribution of -ln SNR, in nats."""
    log_snr_uniform_share: float = 0.2
    """log-snr: share of the draws of t that stay uniform."""
    embedding_noise: bool = True
    """Start from E + sigma_0 * noise on every position, as DiffuSeq does, instead of from E."""
    mse_target: str = "noised"
    """Regress to the noised start (DiffuSeq since its PR 15) or to the clean embedding."""
    mse_positions: str = "all"
    """Positions of the MSE: all (DiffuSeq) or target."""
    mse_weight: float = 1.0
    decoder_weight: float = 1.0
    """Weight of the cross-entropy of the decoder on x_0 (DiffuSeq's embedding regulariser)."""
    prior_weight: float = 1.0
    """Weight of DiffuSeq's x_T term."""
    anchor_weight: float = 0.0
    """Weight of the cross-entropy of the decoder on the prediction of x_0 (anchor loss)."""
    pad_weight: float = 1.0
    """Weight of [PAD] target positions in the means of the MSE and of the anchor loss."""
    condition_dropout: float = 0.0
    """Share of rows whose source tokens become [PAD]: an unconditional model, learnt beside."""
    self_conditioning_share: float = 0.5
    """Share of rows that see the network's own estimate; read if model.self_conditioning is on."""
    save_every: int = 1000
    validate_every: int = 5000

    def check(self) -> None:
        _within(self, 1, 10_000_000, "steps")
        _within(self, 1, 1 << 20, "batch_size", "micro_batch_size")
        _within(self, 0, 1, "learning_rate", "weight_decay")
        _within(self, 0, 0.999999, "beta1", "beta2", "ema_decay")
        _within(self, 0, self.steps, "warmup_steps")
        _within(self, 0, 1e6, "clip_norm")
        _within(self, 0, 1e6, "mse_weight", "decoder_weight", "prior_weight", "anchor_weight")
        _within(self, -20, 20, "log_snr_offset")
        _within(self, 0.01, 20, "log_snr_scale")
        _within(self, 0, 1, "log_snr_uniform_share", "pad_weight", "self_conditioning_share")
        _within(self, 0, 1, "condition_dropout")
        _within(self, 1, 10_000_000, "save_every", "validate_every")
        _one_of(self, ("linear", "cosine", "constant"), "decay")
        _one_of(self, ("uniform", "loss-aware", "log-snr"), "timestep_sampler")
        _one_of(self, ("noised", "clean"), "mse_target")
        _one_of(self, ("all", "target"), "mse_positions")


@dataclass(frozen=True)
class StageConfig(Section):
    """One stage of distillation; names in brackets are those of DLM-One's Table 5."""

    steps: int = 50_000
    """θ updates."""
    batch_size: int = 128
    micro_batch_size: int = 32
    form: str = "sid"
    """sid: DLM-One's loss (Eq. 4), through φ and ψ; kl: the distribution-matching gradient, which
    reaches θ at its output alone and needs no backward pass through φ."""
    mu: float = 1.2
    """μ of the SiD loss (Eq. 4)."""
    dsm_weight: float = 0.5
    """Weight of denoising score matching in the ψ step [a_dsm^sg]."""
    score_adversarial_weight: float = 0.5
    """Weight of the discriminator loss in the ψ step [b_adv^sg]."""
    sid_weight: float = 0.5
    """Weight of the SiD loss in the θ step [a_sd^g]."""
    generator_adversarial_weight: float = 0.5
    """Weight of the adversarial loss in the θ step [b_adv^g]."""
    score_learning_rate: float = 1e-5
    """Learning rate of ψ and its discriminator head [lr_ψ]."""
    generator_learning_rate: float = 1e-5
    """Learning rate of θ [lr_θ]."""
    sid_scale: float = 1.0
    """Factor on the mean-reduced SiD loss, beside sid_weight (SiDA uses 100)."""
    adversarial_scale: float = 1.0
    """Factor on the adversarial losses, beside their weights (SiDA uses 0.01 for θ)."""
    score_steps: int = 1
    """ψ updates per θ update."""
    score_warmup_steps: int = 400
    """ψ-only updates before the first θ update."""
    few_steps: int = 1
    """Calls K that θ learns to make: each row of each update is generated with 1 … K calls, drawn
    evenly, at the timesteps that generation with K steps uses (few-step SiD)."""
    anchor_steps: int = 0
    """Updates of θ alone, before ψ's, on the teacher's paired endpoints (`distill.pairs`)."""
    anchor_weight: float = 0.0
    """Weight of the anchor loss beside the stage's own at the first θ update; keep it small or 0:
    an anchor that stays on freezes the student."""
    anchor_decay_steps: int = 0
    """θ updates over which `anchor_weight` falls linearly to zero; 0: off at once."""
    anchor_learning_rate: float = 1e-4
    """Learning rate of θ in the `anchor_steps` updates."""
    anchor_mse_weight: float = 1.0
    """Weight of the squared error beside the cross-entropy in the anchor loss."""
    adversarial_warmup_steps: int = 400
    """θ updates without the adversarial term, while the new head learns."""
    beta1: float = 0.0
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_value: float = 1.0
    """Largest absolute gradient entry; 0: no clipping by value."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0: no clipping by norm."""
    decay: str = "constant"
    """Learning-rate decay of both optimisers: constant, linear or cosine."""
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    """As for the teacher, by θ updates."""
    weight_floor: float = 1e-5
    """Smallest denominator of the SiD weight, as a fraction of the embedding's RMS."""
    generator_dropout: bool = True
    """Dropout in θ while it is updated."""
    validate_every: int = 200
    save_every: int = 1000

    def check(self) -> None:
        _within(self, 1, 10_000_000, "steps")
        _within(self, 1, 1 << 20, "batch_size", "micro_batch_size")
        _one_of(self, ("sid", "kl"), "form")
        _within(self, -4, 4, "mu")
        _within(self, 0, 1e6, "dsm_weight", "score_adversarial_weight", "sid_weight")
        _within(self, 0, 1e6, "generator_adversarial_weight", "sid_scale", "adversarial_scale")
        _within(self, 0, 1, "score_learning_rate", "generator_learning_rate", "weight_decay")
        _within(self, 1, 100, "score_steps")
        _within(self, 0, 10_000_000, "score_warmup_steps", "adversarial_warmup_steps")
        _within(self, 1, 64, "few_steps")
        _within(self, 0, 10_000_000, "anchor_steps", "anchor_decay_steps")
        _within(self, 0, 1e6, "anchor_weight", "anchor_mse_weight")
        _within(self, 0, 1, "anchor_learning_rate")
        _within(self, 0, 0.999999, "beta1", "beta2", "ema_decay")
        _within(self, 0, 1e6, "clip_value", "clip_norm")
        _within(self, 0, 1, "weight_floor")
        _within(self, 1, 10_000_000, "validate_every", "save_every")
        _one_of(self, ("linear", "cosine", "constant"), "decay")

    @property
    def anchored(self) -> bool:
        """Whether the stage reads the teacher's paired endpoints."""
        return self.anchor_steps > 0 or self.anchored_updates > 0

    @property
    def anchored_updates(self) -> int:
        """θ updates of the stage itself in which the anchor loss has a weight above zero."""
        return min(self.steps, self.anchor_decay_steps) if self.anchor_weight else 0


@dataclass(frozen=True)
class PairsConfig(Section):
    """Paired endpoints: what the teacher's deterministic sampler makes of a noise z and a source,
    for θ to learn from the same z. They are made once, between the teacher and stage 1."""

    count: int = 0
    """Pairs of a source row and a noise; 0: none."""
    per_source: int = 4
    """Noises for each source row; rows follow a seeded order over the training split."""
    sampler: str = "ddim"
    """ddim or dpm-solver++: solvers of the teacher's ODE."""
    steps: int = 20
    """Network calls for each pair."""
    batch_size: int = 256
    """Pairs of one update."""
    save_every: int = 50
    """Updates between checkpoints."""

    def check(self) -> None:
        _within(self, 0, 100_000_000, "count")
        _within(self, 1, 1 << 20, "per_source", "batch_size")
        _one_of(self, ("ddim", "dpm-solver++"), "sampler")
        _within(self, 1, 100_000, "steps")
        _within(self, 1, 10_000_000, "save_every")

    @property
    def updates(self) -> int:
        """Updates that make all pairs; the last one may make fewer than `batch_size`."""
        return -(-self.count // self.batch_size)


@dataclass(frozen=True)
class DistillConfig(Section):
    """What both stages share, and the two stages."""

    t_init: int = 1490
    """Timestep at which θ is called; sigma/alpha = 2.5 on DiffuSeq's schedule."""
    t_min: int = 0
    t_max: int = 1976
    """t is drawn uniformly from [t_min, t_max) for ψ and θ."""
    decodable_margin: float = 0.0
    """Raises t_min to where the log-SNR is this far above the one at which tokens are decodable
    without context; less noise says nothing about the sequence. 2 is a sound choice; 0: off."""
    pad_weight: float = 1.0
    """Weight of positions behind the end of the text, its first [SEP]: the share of them that is
    kept, at random, in the losses of ψ and θ, and their factor in the anchor loss."""
    scale_latent: bool = True
    """Feed sigma(t_init) * z rather than z to θ."""
    discriminator: str = "token_head"
    """Per-token linear head, or channel_mean of the features before the last LayerNorm."""
    logit_clamp: float = 10.0
    """Discriminator logits are clamped to this range in the adversarial losses; 0: not."""
    divide_by_weight: bool = False
    """Divide the generator's adversarial loss by the SiD weight's denominator, as SiDA does."""
    embedding_noise: bool = False
    """Add sigma_0 * noise to real and generated embeddings before noising them."""
    selection_metric: str = "bleu"
    """Validation score that chooses the best checkpoint: bleu, ibleu, or balanced (grammar only:
    the mean of joint correctness and coverage of both registers, so that no collapse wins)."""
    validation_rows: int = 2000
    diagnose_every: int = 500
    """θ updates between the slow diagnostics (fake-net lag, gradient norms of both terms)."""
    pairs: PairsConfig = field(default_factory=PairsConfig)
    stage1: StageConfig = field(default_factory=StageConfig)
    stage2: StageConfig = field(
        default_factory=lambda: StageConfig(
            mu=0.5, sid_weight=0.9, generator_adversarial_weight=0.1
        )
    )

    def check(self) -> None:
        _within(self, 1, 100_000, "t_init")
        _within(self, 0, 100_000, "t_min", "t_max")
        if self.t_min >= self.t_max:
            raise ConfigError(f"t_max must be above t_min ({self.t_min}), got {self.t_max}")
        _one_of(self, ("token_head", "channel_mean"), "discriminator")
        _one_of(self, ("bleu", "ibleu", "balanced"), "selection_metric")
        _within(self, 0, 20, "decodable_margin")
        _within(self, 0, 1, "pad_weight")
        _within(self, 0, 1000, "logit_clamp")
        _within(self, 1, 1_000_000, "validation_rows")
        _within(self, 1, 10_000_000, "diagnose_every")
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            self._check_stage(name, stage)

    def _check_stage(self, name: str, stage: StageConfig) -> None:
        if stage.few_steps > self.t_init:
            raise ConfigError(
                f"{name}.few_steps must be at most t_init ({self.t_init}), got {stage.few_steps}"
            )
        if stage.anchored and not self.pairs.count:
            raise ConfigError(
                f"{name} has anchor_steps or anchor_weight, which need the teacher's paired "
                "endpoints, and distill.pairs.count is 0; set that, or both of them to 0"
            )


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """The comparison table that ends a run."""

    rows: int = 2500
    """Rows of the test split."""
    teacher_steps: str = "2000 200 20 10 5"
    """Numbers of network calls of the teacher rows, separated by spaces; empty: no teacher."""
    student_steps: str = "1 2 4"
    teacher_rows: int = 2500
    """Rows for teacher samplers of up to 50 calls; longer ones use fewer, at equal cost."""
    candidates: int = 1
    """Candidates per source, each from its own noise."""
    batch_size: int = 64
    bootstrap: int = 1000
    """Bootstrap resamples for the 95 % intervals."""

    def check(self) -> None:
        _within(self, 1, 10_000_000, "rows", "teacher_rows")
        _within(self, 1, 64, "candidates")
        _within(self, 1, 4096, "batch_size")
        _within(self, 0, 100_000, "bootstrap")
        for name in ("teacher_steps", "student_steps"):
            if any(not word.isdigit() or int(word) < 1 for word in getattr(self, name).split()):
                raise ConfigError(
                    f"{name} must be whole numbers separated by spaces, got {getattr(self, name)!r}"
                )


@dataclass(frozen=True)
class Config(Section):
    """A whole run: model, data, teacher, distillation, evaluation."""

    preset: str = "grammar"
    """The preset that this configuration started from."""
    data_dir: str = ""
    """Folder with {train,valid,test}.jsonl[.gz]; not used by the generated grammar tasks."""
    output_dir: str = ""
    """Folder of the run; empty: runs/<preset>."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "fp32"
    """fp32; bf16: autocast of the networks, with fp32 weights, losses and optimiser; or auto:
    bf16 where the hardware multiplies it natively (GPUs, CPUs with AVX512-BF16 or AMX)."""
    compile: bool = False
    """Run the training networks through torch.compile."""
    log_every: int = 20
    max_bad_steps: int = 10
    """Steps in a row with a non-finite loss or gradient before the run stops."""
    max_minutes: float = 0.0
    """Minutes after which a run saves and ends with 75, as on SIGTERM; 0: no limit."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check(self) -> None:
        # TOML and the noise both take any 64-bit seed; TOML readers stop at 2^63 - 1.
        _within(self, 0, (1 << 63) - 1, "seed")
        _one_of(self, ("auto", "fp32", "bf16"), "precision")
        _within(self, 1, 1_000_000, "log_every")
        _within(self, 1, 1_000_000, "max_bad_steps")
        _within(self, 0, 1e6, "max_minutes")
        last = self.diffusion.num_timesteps
        if self.distill.t_init >= last or self.distill.t_max > last:
            raise ConfigError(
                f"distill.t_init and distill.t_max must lie within diffusion.num_timesteps "
                f"({last}), got {self.distill.t_init} and {self.distill.t_max}"
            )
        limit = self.data.max_source_tokens or self.model.seq_len // 2
        if limit > self.model.seq_len - 3:
            raise ConfigError(
                f"data.max_source_tokens must leave room for a target in model.seq_len "
                f"({self.model.seq_len}), got {limit}"
            )
        self._check_task()
        self._check_calls()
        if self.distill.pairs.steps > last:
            raise ConfigError(
                f"distill.pairs.steps must be at most diffusion.num_timesteps ({last}), got "
                f"{self.distill.pairs.steps}"
            )

    def _check_task(self) -> None:
        if self.distill.selection_metric == "balanced" and not self.is_grammar:
            raise ConfigError(
                "distill.selection_metric = 'balanced' needs data.task = 'grammar' or "
                f"'grammar-templates', got {self.data.task!r}; use 'bleu' or 'ibleu'"
            )

    def _check_calls(self) -> None:
        # Found now rather than after the training that the table ends.
        for name, most in (
            ("teacher_steps", self.diffusion.num_timesteps),
            ("student_steps", self.distill.t_init),
        ):
            calls = getattr(self.evaluation, name)
            if any(int(word) > most for word in calls.split()):
                raise ConfigError(f"evaluation.{name} must be at most {most} calls, got {calls!r}")

    @property
    def is_grammar(self) -> bool:
        """True for the tasks that the project generates itself."""
        return self.data.task.startswith("grammar")

    @property
    def max_source_tokens(self) -> int:
        """Longest source in tokens, [CLS] and [SEP] included, that inference accepts."""
        return self.data.max_source_tokens or self.model.seq_len // 2
