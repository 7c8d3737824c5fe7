"""Reading a pretrained BERT-family folder, and pruning its vocabulary to what a corpus uses.

FOLDER/config.json
FOLDER/model.safetensors
FOLDER/vocab.txt or FOLDER/tokenizer.json
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.errors import ModelFileError
from dlmone_fast.models.manifest import hash_file
from dlmone_fast.models.plainfiles import StrPath, read_json, regular_file
from dlmone_fast.models.tensors import check_tensors, read_tensors
from dlmone_fast.tokenizer import SPECIAL_TOKENS, Tokenizer
from dlmone_fast.wordpiece import PREFIX

_WEIGHTS = "model.safetensors"
_READ_AT_ONCE = 10_000
# Heads that pretraining leaves behind, and a buffer: nothing here reads them.
_UNUSED = ("pooler.", "cls.", "embeddings.position_ids")
_SIZES = {
    "hidden_size": 8192,
    "num_attention_heads": 128,
    "num_hidden_layers": 128,
    "intermediate_size": 1 << 16,
    "max_position_embeddings": 1 << 16,
    "type_vocab_size": 16,
    "vocab_size": 1_000_000,
}
_OTHER = "name the folder of a BERT-family encoder, such as MiniLM-L6-H384-uncased"


@dataclass(frozen=True)
class Pretrained:
    """A pretrained encoder as plain tensors.

    Tensors are fp32 and named as in the `transformers` library, without a leading "bert.":
    embeddings.word_embeddings.weight [V, H], encoder.layer.0.attention.self.query.weight, ….
    """

    path: Path
    width: int
    heads: int
    layers: int
    ffn: int
    positions: int
    norm_eps: float
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer
    sha256: str
    """Of weights and vocabulary together."""

    def layer(self, index: int, part: str) -> dict[str, Tensor]:
        """weight and bias of a part of a layer, such as "attention.self.query"."""
        name = f"encoder.layer.{index}.{part}."
        return {kind: self.tensors[name + kind] for kind in ("weight", "bias")}

    def rows_of(self, tokenizer: Tokenizer) -> Tensor:
        """The word embeddings [v, H] of another vocabulary's pieces, all of them known here.

        Raises:
            ModelFileError: a piece is not in this vocabulary.
        """
        ids = {piece: i for i, piece in enumerate(self.tokenizer.vocabulary)}
        missing = [piece for piece in tokenizer.vocabulary if piece not in ids]
        if missing:
            raise ModelFileError(
                f"{self.path}: has no embedding of {len(missing):,} pieces of the vocabulary, "
                f"such as {missing[0]!r:.40}; use a vocabulary that was pruned from this folder's"
            )
        rows = torch.tensor([ids[piece] for piece in tokenizer.vocabulary])
        return self.tensors["embeddings.word_embeddings.weight"][rows]


def read_pretrained(folder: StrPath) -> Pretrained:
    """Read a BERT-family folder.

    Raises:
        ModelFileError: a file is missing or malformed, the architecture is another, a tensor is
            missing, misshapen or has NaN, or the vocabulary is not that of the embedding table.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ModelFileError(f"{path}: no such folder; {_OTHER}")
    config = read_json(path, "config.json", ModelFileError)
    where = path / "config.json"
    _check_architecture(config, where)
    sizes = {name: _size(config, name, most, where) for name, most in _SIZES.items()}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ModelFileError(
            f"{where}: num_attention_heads must divide hidden_size ({sizes['hidden_size']}), got "
            f"{sizes['num_attention_heads']}; copy the file again"
        )
    tensors = _tensors(path, sizes)
    tokenizer = _tokenizer(path)
    if tokenizer.vocab_size != sizes["vocab_size"]:
        raise ModelFileError(
            f"{path}: the vocabulary has {tokenizer.vocab_size:,} pieces, the embedding table "
            f"{sizes['vocab_size']:,} rows; the files are of two models: copy both from one"
        )
    digest = hashlib.sha256((hash_file(path / _WEIGHTS) + tokenizer.hash).encode()).hexdigest()
    return Pretrained(
        path=path,
        width=sizes["hidden_size"],
        heads=sizes["num_attention_heads"],
        layers=sizes["num_hidden_layers"],
        ffn=sizes["intermediate_size"],
        positions=sizes["max_position_embeddings"],
        norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        tensors=tensors,
        tokenizer=tokenizer,
        sha256=digest,
    )


def prune_vocabulary(tokenizer: Tokenizer, texts: Iterable[str], min_count: int) -> Tokenizer:
    """The vocabulary without the pieces that texts use less than `min_count` times, order kept.

    The special tokens stay, and so does each single character, within words too, that is ASCII or
    in the texts: what a dropped piece stood for is spelled, and nothing becomes [UNK] that was not.
    """
    counts = _piece_counts(tokenizer, texts)
    pieces = tokenizer.vocabulary
    used = {char for i in counts for char in pieces[i].removeprefix(PREFIX)}

    def stays(index: int, piece: str) -> bool:
        bare = piece.removeprefix(PREFIX) or piece
        spells = len(bare) == 1 and (bare.isascii() or bare in used)
        return counts[index] >= min_count or spells or piece in SPECIAL_TOKENS

    return Tokenizer(
        [piece for index, piece in enumerate(pieces) if stays(index, piece)],
        lowercase=tokenizer.lowercase,
        strip_accents=tokenizer.strip_accents,
        max_chars=tokenizer.max_chars,
    )


def _piece_counts(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    counts: Counter[int] = Counter()
    stream = iter(texts)
    while chunk := list(islice(stream, _READ_AT_ONCE)):
        for ids in tokenizer.encode(chunk):
            counts.update(ids)
    return counts


def _check_architecture(config: Mapping[str, Any], where: Path) -> None:
    expected = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
    }
    for name, value in expected.items():
        found = config.get(name, None if name == "model_type" else value)
        if found != value:
            raise ModelFileError(f"{where}: {name} must be {value!r}, got {found!r:.80}; {_OTHER}")


def _size(config: Mapping[str, Any], name: str, most: int, where: Path) -> int:
    value = config.get(name)
    if type(value) is not int or not 1 <= value <= most:
        raise ModelFileError(
            f"{where}: {name} must be a whole number from 1 to {most:,}, got {value!r:.80}; "
            f"{_OTHER}"
        )
    return value


def _tensors(path: Path, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    found = {
        name.removeprefix("bert."): tensor
        for name, tensor in read_tensors(path, _WEIGHTS, ModelFileError).items()
    }
    used = {name: tensor for name, tensor in found.items() if not name.startswith(_UNUSED)}
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    check_tensors(_shapes(sizes), used, path / _WEIGHTS, dtypes=dtypes)
    return {name: tensor.float() for name, tensor in used.items()}


def _shapes(sizes: Mapping[str, int]) -> dict[str, Sequence[int]]:
    h, f = sizes["hidden_size"], sizes["intermediate_size"]
    shapes: dict[str, Sequence[int]] = {
        "embeddings.word_embeddings.weight": (sizes["vocab_size"], h),
        "embeddings.position_embeddings.weight": (sizes["max_position_embeddings"], h),
        "embeddings.token_type_embeddings.weight": (sizes["type_vocab_size"], h),
    }
    matrices = {f"attention.self.{name}": (h, h) for name in ("query", "key", "value")}
    matrices |= {"attention.output.dense": (h, h)}
    matrices |= {"intermediate.dense": (f, h), "output.dense": (h, f)}
    for index in range(sizes["num_hidden_layers"]):
        for name, shape in matrices.items():
            shapes[f"encoder.layer.{index}.{name}.weight"] = shape
            shapes[f"encoder.layer.{index}.{name}.bias"] = shape[:1]
    norms = [
        f"encoder.layer.{index}.{name}.LayerNorm"
        for index in range(sizes["num_hidden_layers"])
        for name in ("attention.output", "output")
    ]
    for name in ("embeddings.LayerNorm", *norms):
        shapes |= {f"{name}.weight": (h,), f"{name}.bias": (h,)}
    return shapes


def _tokenizer(path: Path) -> Tokenizer:
    if (path / "tokenizer.json").exists():
        return Tokenizer.from_file(regular_file(path, "tokenizer.json", ModelFileError))
    if not (path / "vocab.txt").exists():
        raise ModelFileError(
            f"{path}: neither tokenizer.json nor vocab.txt is there; copy the one that belongs to "
            "the model beside its weights"
        )
    lowercase = True
    if (path / "tokenizer_config.json").exists():
        settings = read_json(path, "tokenizer_config.json", ModelFileError)
        lowercase = settings.get("do_lower_case", True) is not False
    file = regular_file(path, "vocab.txt", ModelFileError)
    return Tokenizer.from_vocab_file(file, lowercase)
