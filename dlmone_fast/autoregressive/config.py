"""The configuration of an autoregressive model and of its training.

Annotations here are types and not strings: reading strings is a twentieth of what `--help` takes.
"""

from dataclasses import dataclass, field

from dlmone_fast.config.section import Section, one_of, within
from dlmone_fast.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig(Section):
    """Sizes of an encoder-decoder transformer."""

    source_vocab: int = 0
    """Entries of the source vocabulary; 0: as many as the vocabulary has."""
    target_vocab: int = 0
    """Entries of the target vocabulary; 0: as many as the vocabulary has."""
    shared_vocab: bool = False
    """One embedding table for both sides; follows the kind of tokens."""
    width: int = 256
    heads: int = 4
    encoder_layers: int = 3
    decoder_layers: int = 3
    ffn: int = 768
    norm: str = "pre"
    """pre: LayerNorm before each part and after the last; post: BERT's order, with LayerNorm after
    the embeddings and a linear layer before the output."""
    dropout: float = 0.1
    """Share of zeros in embeddings and in what attention and feed-forward add."""
    source_positions: int = 64
    """Longest source in tokens, marks included."""
    target_positions: int = 64
    """Longest target in tokens, the mark of its end included."""

    def check(self) -> None:
        within(self, 0, 1_000_000, "source_vocab", "target_vocab")
        within(self, 4, 8192, "width")
        within(self, 1, 128, "heads", "encoder_layers", "decoder_layers")
        within(self, 4, 1 << 16, "ffn")
        within(self, 0, 0.9, "dropout")
        within(self, 2, 1 << 16, "source_positions", "target_positions")
        one_of(self, ("pre", "post"), "norm")
        if self.width % self.heads:
            raise ConfigError(f"heads must divide width ({self.width}), got {self.heads}")
        if self.shared_vocab and self.source_vocab != self.target_vocab:
            raise ConfigError(
                f"target_vocab must be source_vocab ({self.source_vocab}) where both sides share "
                f"a vocabulary, got {self.target_vocab}"
            )


@dataclass(frozen=True)
class TrainingConfig(Section):
    """One training of an autoregressive model."""

    data_dir: str = ""
    """Folder with {train,valid}.jsonl[.gz]: src and trg, and refs where more answers are right."""
    output_dir: str = ""
    """Folder of the run: checkpoints, metrics.jsonl, and the model in OUTPUT_DIR/model."""
    tokens: str = "symbols"
    """symbols: a source of characters, a target of symbols between blanks; wordpiece: text."""
    vocab_file: str = ""
    """wordpiece: vocabulary file, one piece a line; empty: learned on the training split, or
    pruned from --start-from's."""
    vocab_size: int = 8000
    """wordpiece: size of a learned vocabulary."""
    piece_min_count: int = 8
    """--start-from: pieces that the training split has more rarely are spelled instead."""
    lowercase: bool = True
    start_from: str = ""
    """Folder of a pretrained BERT-family model (config.json, model.safetensors, vocab.txt or
    tokenizer.json) whose layers encoder and decoder start from; its sizes are used."""
    both_directions: bool = False
    """wordpiece: train on every row twice, the second time with source and target exchanged."""
    epochs: float = 30.0
    rows: int = 0
    """Training rows seen in all, instead of epochs; 0: epochs."""
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 400
    decay: str = "cosine"
    """Learning-rate decay to zero: cosine, linear, or constant."""
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    """Of matrices; embeddings, biases and LayerNorm have none."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    label_smoothing: float = 0.05
    ema_decay: float = 0.999
    """Of the average of the weights, which is what is validated and stored."""
    seed: int = 0
    precision: str = "auto"
    """fp32; bf16: products and activations in bf16, weights and optimiser in fp32; or auto: bf16
    where the hardware multiplies it natively."""
    save_minutes: float = 10.0
    """Minutes between two checkpoints."""
    max_minutes: float = 0.0
    """Minutes after which a run saves and ends with 75, as on SIGTERM; 0: no limit."""
    validate_every: int = 1000
    """Steps between two validations."""
    validation_rows: int = 1000
    """Rows of the validation split that are scored, from the first; 0: all."""
    selection: str = "auto"
    """Score by which the best weights are kept: auto (wer for symbols, bleu for wordpiece), wer,
    bleu, ibleu, or loss."""
    log_every: int = 50
    """Steps between two records of metrics.jsonl."""
    max_bad_steps: int = 10
    """Steps in a row with a non-finite loss or gradient that end a run."""
    model: ModelConfig = field(default_factory=ModelConfig)

    def check(self) -> None:
        one_of(self, ("symbols", "wordpiece"), "tokens")
        within(self, 64, 1 << 18, "vocab_size")
        within(self, 1, 1_000_000, "piece_min_count")
        within(self, 0.001, 1e6, "epochs")
        within(self, 0, 10**12, "rows")
        within(self, 1, 1 << 16, "batch_size")
        within(self, 0, 1, "learning_rate", "weight_decay")
        within(self, 0, 0.999999, "beta1", "beta2", "ema_decay")
        within(self, 0, 10_000_000, "warmup_steps")
        within(self, 0, 1e6, "clip_norm", "max_minutes")
        within(self, 0, 0.9, "label_smoothing")
        within(self, 0, (1 << 63) - 1, "seed")
        within(self, 0.001, 1e6, "save_minutes")
        within(self, 1, 10_000_000, "validate_every", "log_every", "max_bad_steps")
        within(self, 0, 10_000_000, "validation_rows")
        one_of(self, ("cosine", "linear", "constant"), "decay")
        one_of(self, ("auto", "fp32", "bf16"), "precision")
        one_of(self, ("auto", "wer", "bleu", "ibleu", "loss"), "selection")
        self._check_tokens()

    def _check_tokens(self) -> None:
        symbols = self.tokens == "symbols"
        for name, given in (
            ("vocab_file", bool(self.vocab_file)),
            ("start_from", bool(self.start_from)),
            ("both_directions", self.both_directions),
        ):
            if symbols and given:
                raise ConfigError(f"{name} belongs to tokens = 'wordpiece', got 'symbols'")
        wrong = ("bleu", "ibleu") if symbols else ("wer",)
        if self.selection in wrong:
            raise ConfigError(
                f"selection = {self.selection!r} is not measured with tokens = {self.tokens!r}; "
                f"use {'wer' if symbols else 'bleu, ibleu'} or loss"
            )
        if self.vocab_file and self.start_from:
            raise ConfigError(
                "vocab_file and start_from exclude each other: a start's vocabulary is pruned to "
                "the training split; leave one out"
            )

    @property
    def selected_by(self) -> str:
        """The score by which the best weights are kept."""
        if self.selection != "auto":
            return self.selection
        return "wer" if self.tokens == "symbols" else "bleu"


FREE_KEYS = frozenset(
    {
        "data_dir", "output_dir", "precision", "save_minutes", "max_minutes", "log_every",
        "max_bad_steps", "start_from",
    }
)  # fmt: skip
"""Settings that may differ between two starts of one run; data and start are compared by hash."""
