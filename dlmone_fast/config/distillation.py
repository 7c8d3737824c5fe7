"""The configuration of distillation: the two stages, and the teacher's paired endpoints.

The defaults are DLM-One's (arXiv 2506.00290, Table 5); what the paper leaves open follows code of
the SiD family (see docs/distillation.md).

Annotations here are types and not strings: reading strings is a twentieth of what `--help` takes.
"""

from dataclasses import dataclass, field

from dlmone_fast.config.section import Section, one_of, within
from dlmone_fast.errors import ConfigError


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
    """θ updates over which `anchor_weight` falls linearly to zero."""
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
        within(self, 1, 10_000_000, "steps")
        within(self, 1, 1 << 20, "batch_size", "micro_batch_size")
        one_of(self, ("sid", "kl"), "form")
        within(self, -4, 4, "mu")
        within(self, 0, 1e6, "dsm_weight", "score_adversarial_weight", "sid_weight")
        within(self, 0, 1e6, "generator_adversarial_weight", "sid_scale", "adversarial_scale")
        within(self, 0, 1, "score_learning_rate", "generator_learning_rate", "weight_decay")
        within(self, 1, 100, "score_steps")
        within(self, 0, 10_000_000, "score_warmup_steps", "adversarial_warmup_steps")
        within(self, 1, 64, "few_steps")
        within(self, 0, 10_000_000, "anchor_steps", "anchor_decay_steps")
        within(self, 0, 1e6, "anchor_weight", "anchor_mse_weight")
        within(self, 0, 1, "anchor_learning_rate")
        within(self, 0, 0.999999, "beta1", "beta2", "ema_decay")
        within(self, 0, 1e6, "clip_value", "clip_norm")
        within(self, 0, 1, "weight_floor")
        within(self, 1, 10_000_000, "validate_every", "save_every")
        one_of(self, ("linear", "cosine", "constant"), "decay")
        if self.anchor_weight and not self.anchor_decay_steps:
            raise ConfigError(
                f"anchor_weight is {self.anchor_weight:g} and anchor_decay_steps is 0: it would "
                "never count; set the θ updates over which it falls to zero, or leave it at 0"
            )

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
    targets: str = "teacher"
    """Source of y. teacher: its sampler's text from the same z; data: the training target, whatever
    z is, which makes the control of a distillation: a one-pass model on the same texts."""
    per_source: int = 4
    """Noises for each source row; rows follow a seeded order over the training split."""
    sampler: str = "ddim"
    """ddim or dpm-solver++, solvers of the teacher's ODE; or q-sampling."""
    steps: int = 20
    """Network calls for each pair."""
    temperature: float = 1.0
    """Factor of the sampler's noise: a small teacher's likelier texts are its better ones."""
    rounded: bool = False
    """Round the teacher's prediction to tokens at every call, which keeps its likeliest ones."""
    batch_size: int = 256
    """Pairs of one update."""
    save_every: int = 50
    """Updates between checkpoints."""

    def check(self) -> None:
        within(self, 0, 100_000_000, "count")
        within(self, 1, 1 << 20, "per_source", "batch_size")
        one_of(self, ("teacher", "data"), "targets")
        one_of(self, ("ddim", "dpm-solver++", "q-sampling"), "sampler")
        within(self, 1, 100_000, "steps")
        if self.sampler == "q-sampling" and self.steps > 256:
            # Each call draws noise, whose number has eight bits for the call.
            raise ConfigError(
                f"steps must be at most 256 with the sampler q-sampling, got {self.steps}; make "
                "fewer, or use ddim or dpm-solver++"
            )
        within(self, 0, 10, "temperature")
        within(self, 1, 10_000_000, "save_every")

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
    temperature: float = 1.0
    """Factor of z in training, and the student's default in generation; 0: a control without z."""
    discriminator: str = "token_head"
    """Per-token linear head, or channel_mean of the features before the last LayerNorm."""
    logit_clamp: float = 10.0
    """Discriminator logits are clamped to this range in the adversarial losses; 0: not."""
    divide_by_weight: bool = False
    """Divide the generator's adversarial loss by the SiD weight's denominator, as SiDA does."""
    embedding_noise: bool = False
    """Add sigma_0 * noise to real and generated embeddings before noising them."""
    selection_metric: str = "bleu"
    """Validation score that chooses the best checkpoint: bleu, ibleu; balanced (grammar only:
    the mean of joint correctness and coverage of both registers, so that no collapse wins); or
    word_accuracy (g2p only: the share of words that match a reference)."""
    selection_max_self_bleu: float = 1.0
    """A checkpoint whose texts of one source are more alike than this (self-BLEU) is the best one
    only until there is another: by BLEU alone a student that always says the same wins."""
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
        within(self, 1, 100_000, "t_init")
        within(self, 0, 100_000, "t_min", "t_max")
        if self.t_min >= self.t_max:
            raise ConfigError(f"t_max must be above t_min ({self.t_min}), got {self.t_max}")
        one_of(self, ("token_head", "channel_mean"), "discriminator")
        one_of(self, ("bleu", "ibleu", "balanced", "word_accuracy"), "selection_metric")
        within(self, 0, 20, "decodable_margin")
        within(self, 0, 10, "temperature")
        within(self, 0, 1, "pad_weight", "selection_max_self_bleu")
        within(self, 0, 1000, "logit_clamp")
        within(self, 1, 1_000_000, "validation_rows")
        within(self, 1, 10_000_000, "diagnose_every")
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
