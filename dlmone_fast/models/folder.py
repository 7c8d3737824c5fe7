"""Model folders: config, weights, tokenizer, generation defaults and card under one manifest."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dlmone_fast.errors import ModelFileError, UsageError
from dlmone_fast.models.commit import commit_directory, complete_path
from dlmone_fast.models.manifest import (
    MANIFEST_NAME,
    RESEAL,
    RESTORE,
    FileRecord,
    check_unchanged,
    hash_file,
    identities,
    verify_manifest,
)
from dlmone_fast.models.plainfiles import (
    MAX_JSON_BYTES,
    StrPath,
    is_plain_name,
    parse_json,
    read_bytes,
    read_json,
    regular_file,
    write_json,
)
from dlmone_fast.models.tensors import check_finite, check_tensors, read_tensors, write_tensors

__all__ = ["ModelFolder", "check_tensors", "load_folder", "save_folder"]

FORMAT = "dlmone_fast.model"
VERSION = 1
KINDS = ("teacher", "student")

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TOKENIZER_NAME = "tokenizer.json"
GENERATION_NAME = "generation_config.json"
CARD_NAME = "README.md"
_OWN_NAMES = {
    MANIFEST_NAME, CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME, GENERATION_NAME, CARD_NAME,
}  # fmt: skip

# The model folders of a training run, the last one first.
_OF_A_RUN = ("stage2", "stage1", "teacher")

_WEIGHTS_FILE = re.compile(r"model[A-Za-z0-9._-]{0,100}\.safetensors")
_MAX_SHARDS = 1000


@dataclass(frozen=True)
class ModelFolder:
    """A model folder whose files all matched its manifest."""

    path: Path
    config: dict[str, Any]
    """config.json: format, version, kind, model, diffusion, generation, source."""
    tensors: dict[str, Tensor]
    """All weights by name, on the CPU, in the dtype in which they are stored."""
    tokenizer_path: Path | None
    generation_config: dict[str, Any]
    """generation_config.json; empty if the folder has none."""
    files: dict[str, FileRecord]
    """What the manifest lists."""

    def read_json(self, name: str) -> dict[str, Any]:
        """Read another JSON file of the folder that the manifest lists.

        Raises:
            ModelFileError: the file is not listed, has changed, or is not a JSON object.
        """
        where = self.path / name
        if name not in self.files:
            raise ModelFileError(f"{where}: is not listed in {MANIFEST_NAME}; {RESEAL}")
        content = read_bytes(self.path, name, ModelFileError, MAX_JSON_BYTES)
        if hashlib.sha256(content).hexdigest() != self.files[name].sha256:
            raise ModelFileError(f"{where}: was changed after the folder was loaded; load it again")
        return parse_json(content, where, ModelFileError)


def save_folder(
    path: StrPath,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer_json: str | None = None,
    generation_config: Mapping[str, Any] | None = None,
    card: str = "",
    extra_json: Mapping[str, Mapping[str, Any]] | None = None,
    max_shard_bytes: int | None = None,
) -> Path:
    """Write a model folder, replacing an older one under that name in one step.

    Args:
        config: must hold kind ("teacher" or "student"), model and diffusion; format, version and
            weights (the names of the weight files) are filled in.
        tensors: weights by name; dtypes are kept.
        tokenizer_json: content of tokenizer.json, or None for a folder without a tokenizer.
        card: the model card, written to README.md.
        extra_json: further JSON files by name, e.g. training_summary.json.
        max_shard_bytes: split the weights into files of at most this many bytes of tensors.

    Returns:
        The resolved path of the folder.

    Raises:
        ModelFileError: the weights are not finite, the config is incomplete, or the folder cannot
            be written; what was there before is then intact.
        UsageError: a name in `extra_json` cannot be used, or a tensor is larger than a shard.
    """
    shards = _shards(tensors, max_shard_bytes)
    content = {**config, "format": FORMAT, "version": VERSION, "weights": list(shards)}
    _check_config(content, Path(path) / CONFIG_NAME)
    check_finite(tensors, Path(path) / WEIGHTS_NAME, ModelFileError)
    extra = dict(extra_json or {})
    for name in extra:
        if name in _OWN_NAMES or not is_plain_name(name) or not name.endswith(".json"):
            raise UsageError(
                f"extra_json: {name!r} cannot be used; expected a plain name that ends in .json "
                "and is none of the folder's own"
            )

    def write(folder: Path) -> None:
        write_json(folder / CONFIG_NAME, content, ModelFileError)
        write_json(folder / GENERATION_NAME, generation_config or {}, ModelFileError)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        if tokenizer_json is not None:
            (folder / TOKENIZER_NAME).write_text(tokenizer_json, encoding="utf-8")
        for name, value in extra.items():
            write_json(folder / name, value, ModelFileError)
        for name, part in shards.items():
            write_tensors(folder / name, part)

    return commit_directory(path, write)


def copy_folder(folder: ModelFolder, path: StrPath) -> Path:
    """Write the files of a model folder, as its manifest lists them, under another path.

    Raises:
        ModelFileError: a file has changed since it was loaded, or cannot be read or written.
    """

    def write(target: Path) -> None:
        for name, record in folder.files.items():
            source = regular_file(folder.path, name, ModelFileError)
            shutil.copyfile(source, target / name)
            # The copy, not the source: its new manifest would vouch for whatever was written.
            if hash_file(target / name) != record.sha256:
                raise ModelFileError(
                    f"{source}: is not what was loaded from it (its sha256 differs); copy the "
                    "folder again from its source, and load it again"
                )

    return commit_directory(path, write)


def load_folder(path: StrPath) -> ModelFolder:
    """Load a model folder after checking every file against the manifest.

    A file that the manifest does not list is ignored, unless it bears one of the names that a
    model folder uses (tokenizer.json and so on): those must be listed.

    Raises:
        ModelFileError: a file is missing, damaged, malformed or not listed, changes while it is
            read, or the folder has a newer format; the message names the file and the reason.
    """
    path = complete_path(path)
    _refuse_run_folder(path)
    before = identities(path)
    files = verify_manifest(path, ModelFileError, required=(CONFIG_NAME,))
    for name in (TOKENIZER_NAME, GENERATION_NAME):
        if name not in files and os.path.lexists(path / name):
            raise ModelFileError(
                f"{path / name}: is not listed in {MANIFEST_NAME}; remove it, or, if it was added "
                "on purpose, call dlmone_fast.models.manifest.write_manifest(folder)"
            )
    config = {"weights": [WEIGHTS_NAME], **read_json(path, CONFIG_NAME, ModelFileError)}
    _check_config(config, path / CONFIG_NAME)
    tensors: dict[str, Tensor] = {}
    for name, part in _read_weights(path, config["weights"], files):
        for key, tensor in part.items():
            if key in tensors:
                raise ModelFileError(
                    f"{path / name}: {key} is in another weight file as well; {RESTORE}"
                )
            tensors[key] = tensor
    generation = (
        read_json(path, GENERATION_NAME, ModelFileError) if GENERATION_NAME in files else {}
    )
    check_unchanged(path, before, files)
    return ModelFolder(
        path=path,
        config=config,
        tensors=tensors,
        tokenizer_path=path / TOKENIZER_NAME if TOKENIZER_NAME in files else None,
        generation_config=generation,
        files=files,
    )


def _refuse_run_folder(path: Path) -> None:
    """Name the models of a training run to whoever names its folder."""
    if os.path.lexists(path / MANIFEST_NAME):
        return
    inside = [n for n in _OF_A_RUN if os.path.isfile(path / n / MANIFEST_NAME)]
    if inside:
        also = f" (or its {' or '.join(inside[1:])})" if inside[1:] else ""
        raise ModelFileError(
            f"{path}: is the folder of a training run and no model folder; name the model in it: "
            f"{path / inside[0]}{also}"
        )


def _read_weights(
    path: Path, names: list[str], files: Mapping[str, FileRecord]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name in names:
        if name not in files:
            raise ModelFileError(f"{path / name}: is not listed in {MANIFEST_NAME}; {RESEAL}")
        yield name, read_tensors(path, name, ModelFileError)


def _check_config(config: Mapping[str, Any], where: Path) -> None:
    """Check the frame of config.json; the sections' own keys are checked by their dataclasses."""
    if config.get("format") != FORMAT:
        raise ModelFileError(
            f"{where}: format must be {FORMAT!r}, got {config.get('format')!r:.80}; is this the "
            "folder of another program's model?"
        )
    version = config.get("version")
    if type(version) is not int or version < 1:
        raise ModelFileError(
            f"{where}: version must be a whole number from 1, got {version!r:.80}; {RESTORE}"
        )
    if version > VERSION:
        raise ModelFileError(
            f"{where}: has version {version}, this release reads up to {VERSION}; install a newer "
            "dlmone_fast"
        )
    if config.get("kind") not in KINDS:
        raise ModelFileError(
            f"{where}: kind must be {' or '.join(KINDS)}, got {config.get('kind')!r:.80}; {RESTORE}"
        )
    for name in ("model", "diffusion"):
        if not isinstance(config.get(name), Mapping):
            raise ModelFileError(f"{where}: must hold an object {name!r}; {RESTORE}")
    for name in ("generation", "source"):
        if not isinstance(config.get(name, {}), Mapping):
            raise ModelFileError(f"{where}: {name!r} must be an object; {RESTORE}")
    _check_weight_names(config.get("weights"), where)


def _check_weight_names(names: object, where: Path) -> None:
    valid = (
        isinstance(names, list)
        and 0 < len(names) <= _MAX_SHARDS
        and all(isinstance(name, str) and _WEIGHTS_FILE.fullmatch(name) for name in names)
        and len(set(names)) == len(names)
    )
    if not valid:
        raise ModelFileError(
            f"{where}: weights must list 1 to {_MAX_SHARDS} different names like {WEIGHTS_NAME}; "
            f"{RESTORE}"
        )


def _shards(
    tensors: Mapping[str, Tensor], max_shard_bytes: int | None
) -> dict[str, dict[str, Tensor]]:
    """Split tensors, in order, into files of at most `max_shard_bytes` each."""
    limit = math.inf if max_shard_bytes is None else max_shard_bytes
    parts: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > limit:
            raise UsageError(
                f"max_shard_bytes: {name} alone has {size:,} bytes, more than {limit:,}; use a "
                "larger value or store the weights in bf16"
            )
        if filled + size > limit:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += size
    if len(parts) == 1:
        return {WEIGHTS_NAME: parts[0]}
    total = len(parts)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": part for i, part in enumerate(parts, 1)}
