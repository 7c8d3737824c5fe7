"""Conversion of original DiffuSeq checkpoints (arXiv 2210.08933; Shark-NLP/DiffuSeq, f78945d).

The one module that unpickles, and only through torch's restricted unpickler, on a file whose
container and pickle were checked first (`archive.py`). Nothing in the checkpoint is believed: sizes
come from the tensors, paths in training_args.json are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.config import DiffusionConfig, ModelConfig
from dlmone_fast.errors import ModelFileError, UsageError
from dlmone_fast.models.archive import check_archive
from dlmone_fast.models.diffuseq_convert import ARGS_NAME, EMBEDDINGS, ONLY_V1, convert
from dlmone_fast.models.folder import save_folder
from dlmone_fast.models.manifest import MANIFEST_NAME, hash_file
from dlmone_fast.models.plainfiles import StrPath, read_json
from dlmone_fast.tokenizer import Tokenizer

MAX_CHECKPOINT_BYTES = 4 << 30
_MIN_TORCH = (2, 10)
_CHECKPOINT_NAME = re.compile(r"ema_.+_(\d+)\.pt")


@dataclass(frozen=True)
class ImportReport:
    """What `import_teacher` did."""

    path: Path
    checkpoint: Path
    embedding: str
    embedding_difference: float
    """Largest absolute difference between the file's two embedding matrices."""
    num_parameters: int
    model: ModelConfig
    diffusion: DiffusionConfig
    has_tokenizer: bool
    lowercase: bool | None = None
    """Whether the tokenizer lower-cases its text; None without one."""


def import_teacher(
    checkpoint_dir: StrPath,
    out: StrPath,
    *,
    embedding: str = "raw",
    checkpoint: StrPath | None = None,
    vocab: StrPath | None = None,
    lowercase: bool | None = None,
    max_bytes: int = MAX_CHECKPOINT_BYTES,
    overwrite: bool = False,
) -> ImportReport:
    """Write a model folder from a DiffuSeq checkpoint folder.

    Args:
        checkpoint_dir: folder with ema_*_{step}.pt and training_args.json.
        out: the model folder to write.
        embedding: "raw" (what the official sampler uses) or "ema"; see `convert`.
        checkpoint: the .pt file; None: the highest step among ema_*_{step}.pt.
        vocab: BERT vocab.txt of the checkpoint; None: the folder has no tokenizer.
        lowercase: whether its text was lower-cased; None: as the BERT model does that
            training_args.json names (`config_name`), or, if that name does not tell, as the
            vocabulary's own words.
        max_bytes: largest .pt file to open.
        overwrite: replace a model folder at `out`.

    Raises:
        ModelFileError: a file is missing, hostile, damaged, or is not of a DiffuSeq v1 model; or
            the vocabulary has another size; or the folder cannot be written.
        UsageError: an argument cannot be used, or `out` exists and `overwrite` is not set.
    """
    folder, out = Path(checkpoint_dir), Path(out)
    if embedding not in EMBEDDINGS:
        raise UsageError(f"embedding must be raw or ema, got {embedding!r}")
    if (out / MANIFEST_NAME).exists() and not overwrite:
        raise UsageError(f"{out}: exists; pass --overwrite to replace it or choose another folder")
    file = find_checkpoint(folder, checkpoint)
    args = read_training_args(folder)
    converted = convert(load_state_dict(file, max_bytes), args, file, embedding)
    if lowercase is not None and vocab is None:
        raise UsageError("lowercase (--cased, --uncased): belongs to a vocabulary; add --vocab")
    tokenizer = None
    if vocab is not None:
        tokenizer = _tokenizer(vocab, converted.model.vocab_size, args, lowercase)
    source = {
        "format": "DiffuSeq",
        "checkpoint": file.name,
        "checkpoint_sha256": hash_file(file),
        "training_args_sha256": hash_file(folder / ARGS_NAME),
        "embedding": embedding,
        "embedding_difference": converted.embedding_difference,
    }
    num_parameters = sum(tensor.numel() for tensor in converted.tensors.values())
    path = save_folder(
        out,
        config={
            "kind": "teacher",
            "model": asdict(converted.model),
            "diffusion": asdict(converted.diffusion),
            "generation": {},
            "source": source,
        },
        tensors=converted.tensors,
        tokenizer_json=None if tokenizer is None else tokenizer.to_json(),
        card=_card(file.name, embedding, converted.model, num_parameters),
    )
    return ImportReport(
        path=path,
        checkpoint=file,
        embedding=embedding,
        embedding_difference=converted.embedding_difference,
        num_parameters=num_parameters,
        model=converted.model,
        diffusion=converted.diffusion,
        has_tokenizer=tokenizer is not None,
        lowercase=None if tokenizer is None else tokenizer.lowercase,
    )


def find_checkpoint(folder: Path, checkpoint: StrPath | None = None) -> Path:
    """Return the .pt file to import: the given one, or the highest step in the folder.

    Raises:
        ModelFileError: there is none, or two files share the highest step.
    """
    if not folder.is_dir():
        raise ModelFileError(
            f"{folder}: no such folder; give the folder that holds ema_*.pt and {ARGS_NAME}"
        )
    if checkpoint is not None:
        for path in (folder / checkpoint, Path(checkpoint)):
            if path.is_file():
                return path
        raise ModelFileError(f"{checkpoint}: no such file, in {folder} or here; give its path")
    matches = ((path, _CHECKPOINT_NAME.fullmatch(path.name)) for path in sorted(folder.iterdir()))
    steps = [(int(match[1]), path) for path, match in matches if match]
    if not steps:
        others = ", ".join(sorted(path.name for path in folder.glob("*.pt"))[:3])
        raise ModelFileError(
            f"{folder}: holds no ema_*_<step>.pt"
            + (f" but {others}; name the file to import with --checkpoint" if others else "")
        )
    best = [path for step, path in steps if step == max(steps)[0]]
    if len(best) > 1:
        raise ModelFileError(
            f"{folder}: {best[0].name} and {best[1].name} are of the same step; choose one with "
            "--checkpoint"
        )
    return best[0]


def read_training_args(folder: Path) -> dict[str, Any]:
    """Read training_args.json and check that it describes a model this package can run.

    Raises:
        ModelFileError: the file is missing or malformed, or a setting is not supported.
    """
    where = folder / ARGS_NAME
    if not where.exists():
        raise ModelFileError(
            f"{where}: the file is missing; DiffuSeq writes it beside its checkpoints, and the "
            "noise schedule cannot be known without it: copy it next to the .pt file"
        )
    args = read_json(folder, ARGS_NAME, ModelFileError)
    required = {"predict_xstart": True, "learn_sigma": False}
    for key, value in required.items():
        if args.get(key) is not value:
            raise ModelFileError(
                f"{where}: {key} must be {value}, got {args.get(key)!r:.80}; {ONLY_V1}"
            )
    if args.get("timestep_respacing", "") not in ("", None):
        raise ModelFileError(
            f"{where}: timestep_respacing must be empty, as in all released models; {ONLY_V1}"
        )
    if not isinstance(args.get("bert_config", {}), dict):
        raise ModelFileError(f"{where}: bert_config must be an object; {ONLY_V1}")
    missing = [key for key in ("diffusion_steps", "noise_schedule", "seq_len") if key not in args]
    if missing:
        raise ModelFileError(f"{where}: lacks {', '.join(missing)}; use the original file")
    return args


def load_state_dict(file: StrPath, max_bytes: int = MAX_CHECKPOINT_BYTES) -> dict[str, Tensor]:
    """Read the tensors of a .pt file without running anything that it holds.

    The file must be a zip archive of uncompressed records, as torch.save writes it, whose pickle
    names what tensors are made of and nothing else, so memory is bounded by its size; the tensors
    are a map of the file. There is no fallback.

    Raises:
        ModelFileError: the file is too large, not such an archive, or holds more than tensors.
    """
    file = Path(file)
    _check_torch()
    check_archive(file, max_bytes)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    # The file is hostile until proven otherwise and torch documents no list of what its
    # unpickler raises on one.
    except Exception as reason:
        raise ModelFileError(
            f"{file}: torch's safe loader refused it ({type(reason).__name__}); only state dicts "
            "of tensors are imported, never code: copy it again from its source"
        ) from reason
    if not isinstance(state, Mapping):
        raise ModelFileError(
            f"{file}: expected a state dict, found {type(state).__name__}; {ONLY_V1}"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not _is_stored_tensor(value):
            raise ModelFileError(
                f"{file}: the entry {name!r:.80} is not a plain tensor; expected the state dict "
                "of a DiffuSeq model"
            )
    return {name: value.detach() for name, value in state.items()}


def _check_torch() -> None:
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release is None or (int(release[1]), int(release[2])) < _MIN_TORCH:
        raise ModelFileError(
            f"torch {torch.__version__} cannot be trusted with .pt files (CVE-2025-32434, "
            f"CVE-2026-24747); install torch >= {_MIN_TORCH[0]}.{_MIN_TORCH[1]}"
        )


def _is_stored_tensor(value: object) -> bool:
    """True for a dense CPU tensor whose elements are all in the file (no expanded views)."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.is_contiguous()
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _tokenizer(
    vocab: StrPath, vocab_size: int, args: Mapping[str, Any], lowercase: bool | None
) -> Tokenizer:
    tokenizer = Tokenizer.from_vocab_file(Path(vocab))
    if lowercase is None:
        lowercase = _named_lowercase(args)
    if lowercase is None:
        lowercase = not tokenizer.is_cased
    if not lowercase:
        tokenizer = Tokenizer.from_vocab_file(Path(vocab), lowercase=False)
    if tokenizer.vocab_size != vocab_size:
        raise ModelFileError(
            f"{vocab}: has {tokenizer.vocab_size:,} tokens, the checkpoint {vocab_size:,}; give "
            "the vocab.txt that the checkpoint was trained with"
        )
    return tokenizer


def _named_lowercase(args: Mapping[str, Any]) -> bool | None:
    """Whether the BERT model lower-cases that DiffuSeq took its tokenizer from; None: its name does
    not tell."""
    # A path may name other models: the last part is the model's own.
    name = str(args.get("config_name") or "").rstrip("/").rsplit("/", 1)[-1].lower()
    if "uncased" in name:
        return True
    return False if "cased" in name else None


def _card(checkpoint: str, embedding: str, model: ModelConfig, num_parameters: int) -> str:
    return f"""---
library_name: dlmone_fast
tags: [text-generation, diffusion]
---

# DiffuSeq teacher

Converted from the DiffuSeq checkpoint `{checkpoint}` (arXiv 2210.08933) with its {embedding}
embedding matrix: {num_parameters:,} parameters, {model.num_layers} layers of width
{model.hidden_size}, sequence length {model.seq_len}, vocabulary of {model.vocab_size:,}.

It is a many-step diffusion model: `dlmone_fast.load_teacher(folder)` loads it, and
`python -m dlmone_fast.train --preset qqp --teacher folder --data-dir DATA` distils it into a
one-step model (for other data name another preset, or a file with `--config`).
`config.json` records the hashes of the files that it was made from. The licence and the training
data are those of the checkpoint.
"""
