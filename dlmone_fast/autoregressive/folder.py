"""Model folders of autoregressive models: sizes, weights and vocabulary under one manifest.

FOLDER/config.json         format, version, sizes, kind of tokens, and what it was trained on
FOLDER/model.safetensors
FOLDER/symbols.json or FOLDER/tokenizer.json
FOLDER/manifest.json       size and sha256 of each file; its own sha256 is the model's
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.autoregressive.config import ModelConfig
from dlmone_fast.autoregressive.model import EncoderDecoder
from dlmone_fast.autoregressive.vocabulary import (
    SYMBOLS_NAME,
    TOKENIZER_NAME,
    Symbols,
    Vocabulary,
    WordPiece,
    read_vocabulary,
)
from dlmone_fast.errors import ConfigError, ModelFileError
from dlmone_fast.models.commit import commit_directory, complete_path
from dlmone_fast.models.manifest import (
    MANIFEST_NAME,
    check_unchanged,
    hash_file,
    identities,
    verify_manifest,
)
from dlmone_fast.models.plainfiles import StrPath, read_json, write_json
from dlmone_fast.models.tensors import (
    check_finite,
    check_tensors,
    read_tensors,
    write_tensors,
)

FORMAT = "dlmone_fast.autoregressive"
VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_TOKENS = {Symbols.kind: SYMBOLS_NAME, WordPiece.kind: TOKENIZER_NAME}


@dataclass(frozen=True)
class StoredModel:
    """A model as it was read from its folder."""

    path: Path
    model: EncoderDecoder
    vocabulary: Vocabulary
    source: dict[str, Any]
    """The training's own record: its data, settings and progress."""
    sha256: str
    """Of the manifest, and so of everything in the folder."""


def save_model(
    path: StrPath,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    vocabulary: Vocabulary,
    source: Mapping[str, Any],
) -> Path:
    """Write a model folder, replacing an older one under that name in one step.

    Args:
        tensors: the parameters of an `EncoderDecoder` by name.
        source: plain values that say what the model was trained on.

    Raises:
        ModelFileError: the weights are not finite, or the folder cannot be written; what was
            there before is then intact.
    """
    check_finite(tensors, Path(path) / WEIGHTS_NAME, ModelFileError)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "tokens": vocabulary.kind,
        "model": dataclasses.asdict(config),
        "source": dict(source),
    }

    def write(folder: Path) -> None:
        write_json(folder / CONFIG_NAME, content, ModelFileError)
        (folder / vocabulary.file_name).write_text(vocabulary.file_text(), encoding="utf-8")
        write_tensors(folder / WEIGHTS_NAME, tensors)

    return commit_directory(path, write)


def read_model(path: StrPath) -> StoredModel:
    """Read a model folder after checking every file against the manifest.

    Raises:
        ModelFileError: a file is missing, damaged, malformed, not listed, or does not fit the
            others; the message names it.
    """
    path = complete_path(path)
    before = identities(path)
    files = verify_manifest(path, ModelFileError, required=(CONFIG_NAME, WEIGHTS_NAME))
    content = read_json(path, CONFIG_NAME, ModelFileError)
    where = path / CONFIG_NAME
    _check_frame(content, where)
    kind = content["tokens"]
    if _TOKENS[kind] not in files:
        raise ModelFileError(
            f"{path / _TOKENS[kind]}: is not listed in {MANIFEST_NAME}; copy the folder again"
        )
    config = _sizes(content["model"], where)
    vocabulary = read_vocabulary(path, kind)
    _check_sizes(config, vocabulary, where)
    tensors = read_tensors(path, WEIGHTS_NAME, ModelFileError)
    check_unchanged(path, before, files)
    model = _with_weights(config, tensors, path / WEIGHTS_NAME)
    digest = hash_file(path / MANIFEST_NAME)
    return StoredModel(path, model, vocabulary, content["source"], digest)


def _with_weights(
    config: ModelConfig, tensors: Mapping[str, Tensor], where: Path
) -> EncoderDecoder:
    # Sizes first: nothing is allocated that the file does not have.
    with torch.device("meta"):
        expected = dict(EncoderDecoder(config).named_parameters())
    check_tensors({name: tuple(p.shape) for name, p in expected.items()}, tensors, where)
    model = EncoderDecoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model.eval().requires_grad_(False)


def _check_frame(content: Mapping[str, Any], where: Path) -> None:
    if content.get("format") != FORMAT:
        raise ModelFileError(
            f"{where}: format must be {FORMAT!r}, got {content.get('format')!r:.80}; name a folder "
            "that dlmone_fast.train_autoregressive wrote"
        )
    if content.get("version") != VERSION:
        raise ModelFileError(
            f"{where}: has version {content.get('version')!r:.40}, this release reads {VERSION}; "
            "install the dlmone_fast that wrote it"
        )
    if content.get("tokens") not in _TOKENS:
        raise ModelFileError(
            f"{where}: tokens must be {' or '.join(_TOKENS)}, got {content.get('tokens')!r:.40}; "
            "copy the folder again from its source"
        )
    for name in ("model", "source"):
        if not isinstance(content.get(name), dict):
            raise ModelFileError(f"{where}: must hold an object {name!r}; copy the folder again")


def _sizes(values: Mapping[str, Any], where: Path) -> ModelConfig:
    known = {item.name for item in dataclasses.fields(ModelConfig)}
    if set(values) != known:
        raise ModelFileError(
            f"{where}: model must have the keys {', '.join(sorted(known))}; got "
            f"{', '.join(sorted(map(str, values)))!r:.300}"
        )
    try:
        return ModelConfig(**values)
    except ConfigError as error:
        raise ModelFileError(f"{where}: model.{error}") from error


def _check_sizes(config: ModelConfig, vocabulary: Vocabulary, where: Path) -> None:
    stated = config.source_vocab, config.target_vocab, config.shared_vocab
    actual = vocabulary.source_size, vocabulary.target_size, vocabulary.shared
    if stated != actual:
        raise ModelFileError(
            f"{where}: states vocabularies of {stated[0]} and {stated[1]} entries, "
            f"{vocabulary.file_name} has {actual[0]} and {actual[1]}; the files were mixed up"
        )
