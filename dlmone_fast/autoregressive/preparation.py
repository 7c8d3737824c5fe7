"""From a data folder to what a training reads: vocabulary, encoded pairs, sizes, and hashes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlmone_fast.autoregressive.batches import Dropped, Pairs, encode_pairs
from dlmone_fast.autoregressive.config import ModelConfig, TrainingConfig
from dlmone_fast.autoregressive.vocabulary import (
    Vocabulary,
    WordPiece,
    learn_symbols,
)
from dlmone_fast.data.rows import Row, find_split, load_rows
from dlmone_fast.errors import ConfigError, DataError
from dlmone_fast.models.manifest import hash_file
from dlmone_fast.models.pretrained import Pretrained, prune_vocabulary, read_pretrained
from dlmone_fast.tokenizer import Tokenizer
from dlmone_fast.training.workspace import find_vocabulary


@dataclass(frozen=True)
class Prepared:
    """The data of a training."""

    config: TrainingConfig
    """With the sizes that vocabulary and start decide."""
    vocabulary: Vocabulary
    train: Pairs
    valid: Pairs
    valid_rows: list[Row]
    """The rows that are scored."""
    dropped: Dropped
    dropped_valid: Dropped
    """Of the validation pairs, for their loss."""
    start: Pretrained | None
    inputs: dict[str, str]
    """Hashes of data, vocabulary and start; a checkpoint of others is refused."""


def prepare(config: TrainingConfig) -> Prepared:
    """Read the data and the start of a training.

    Raises:
        ConfigError: no folder is named.
        DataError: files are missing or malformed, or no row can be used.
        ModelFileError: the start cannot be used.
    """
    for name in ("data_dir", "output_dir"):
        if not getattr(config, name):
            raise ConfigError(f"--{name.replace('_', '-')} is missing; name a folder")
    data_dir = Path(config.data_dir)
    rows = load_rows(data_dir, "train")
    valid = load_rows(data_dir, "valid", config.validation_rows or None)
    start = read_pretrained(config.start_from) if config.start_from else None
    vocabulary = _vocabulary(config, rows, start)
    model = _model(config.model, vocabulary, start)
    positions = model.source_positions, model.target_positions
    train, dropped = encode_pairs(rows, vocabulary, positions, config.both_directions)
    measured, dropped_valid = encode_pairs(valid, vocabulary, positions)
    inputs = {
        "train data": hash_file(find_split(data_dir, "train")),
        "validation data": hash_file(find_split(data_dir, "valid")),
        "vocabulary": vocabulary.hash,
        "start": start.sha256 if start else "",
    }
    return Prepared(
        dataclasses.replace(config, model=model),
        vocabulary,
        train,
        measured,
        _scored(valid, vocabulary),
        dropped,
        dropped_valid,
        start,
        inputs,
    )


def _vocabulary(
    config: TrainingConfig, rows: Sequence[Row], start: Pretrained | None
) -> Vocabulary:
    if config.tokens == "symbols":
        return learn_symbols([(row.src, row.trg) for row in rows], config.lowercase)
    texts = [text for row in rows for text in (row.src, row.trg)]
    if start is not None:
        return WordPiece(prune_vocabulary(start.tokenizer, texts, config.piece_min_count))
    if config.vocab_file:
        path = find_vocabulary(config.vocab_file, Path(config.data_dir))
        return WordPiece(Tokenizer.from_vocab_file(path, config.lowercase))
    return WordPiece(Tokenizer.learn(texts, config.vocab_size, config.lowercase))


def _model(model: ModelConfig, vocabulary: Vocabulary, start: Pretrained | None) -> ModelConfig:
    sizes = {"source_vocab": vocabulary.source_size, "target_vocab": vocabulary.target_size}
    for name, size in sizes.items():
        if getattr(model, name) not in (0, size):
            raise ConfigError(
                f"model.{name} is {getattr(model, name)}, the vocabulary has {size}; set it to 0"
            )
    model = dataclasses.replace(
        model,
        source_vocab=vocabulary.source_size,
        target_vocab=vocabulary.target_size,
        shared_vocab=vocabulary.shared,
    )
    if start is None:
        return model
    for name in ("source_positions", "target_positions"):
        if getattr(model, name) > start.positions:
            raise ConfigError(
                f"model.{name} must be at most {start.positions}, the positions of --start-from, "
                f"got {getattr(model, name)}"
            )
    # Half of the layers, every other one, make a decoder that is as deep as it is useful.
    return dataclasses.replace(
        model,
        width=start.width,
        heads=start.heads,
        ffn=start.ffn,
        encoder_layers=start.layers,
        decoder_layers=max(1, start.layers // 2),
        norm="post",
    )


def _scored(rows: list[Row], vocabulary: Vocabulary) -> list[Row]:
    """All rows; of symbols those whose characters are known, as the others can only be refused."""
    if vocabulary.kind == WordPiece.kind:
        return rows
    known = vocabulary.reads([row.src for row in rows])
    scored = [row for row, is_known in zip(rows, known, strict=True) if is_known]
    if not scored:
        raise DataError(
            f"valid: none of {len(rows):,} sources consists of characters of the training split; "
            "name splits of one task"
        )
    return scored
