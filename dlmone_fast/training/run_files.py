"""The files of a run folder: what is to stand in them, their record, and writing them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlmone_fast.config import Config, to_dict
from dlmone_fast.files import write_atomically
from dlmone_fast.models.manifest import hash_file
from dlmone_fast.tasks import grammar
from dlmone_fast.training.owned import RunRecord, StrPath, writing

CONFIG_NAME, TOKENIZER_NAME = "config.toml", "tokenizer.json"
_GENERATED_ROWS = 1000


def record_files(
    root: Path,
    before: RunRecord | None,
    wanted: dict[str, str],
    made_from: dict[str, dict[str, Any]],
    fresh: bool,
) -> None:
    """Write run.json, ahead of the files that it vouches for.

    Args:
        root: the run folder.
        before: its record so far.
        wanted: sha256 of each file that is to stand there, by name.
        made_from: identities of what these were made from.
        fresh: the run starts over.
    """
    known = {} if fresh or before is None else before.files
    files: dict[str, list[str]] = {name: list(hashes) for name, hashes in known.items()}
    for name, sha256 in wanted.items():
        there = [hash_file(root / name)] if os.path.isfile(root / name) else []
        files[name] = list(dict.fromkeys([*there, sha256]))
    starts = 1 if before is None else before.starts + fresh
    sources = {} if fresh or before is None else dict(before.made_from)
    if TOKENIZER_NAME in known and TOKENIZER_NAME not in sources:
        # A run of a version that kept no record: what its tokenizer was made from nobody wrote.
        made_from = {name: source for name, source in made_from.items() if name != TOKENIZER_NAME}
    RunRecord(files, {**sources, **made_from}, starts).saved(root)


def write_files(
    root: Path, config: Config, contents: dict[str, bytes | None], wanted: dict[str, str]
) -> None:
    """Write the files of a run that are not there as they are wanted; the configuration last."""
    splits = [name for name in wanted if name not in contents]
    if any(_differs(root / name, wanted[name]) for name in splits):
        rows = data_source(config)
        grammar.write_splits(
            root / "data", rows["task"], rows["seed"], rows["train"], rows["valid"], rows["test"]
        )
    for name, content in contents.items():
        if content is not None and _differs(root / name, wanted[name]):
            with writing(root / name):
                write_atomically(root / name, [content])


def _differs(file: Path, sha256: str) -> bool:
    return not os.path.isfile(file) or hash_file(file) != sha256


def is_given(file: Path, keep: Sequence[StrPath]) -> bool:
    """True if a file is one of the caller's."""
    return os.path.isfile(file) and any(
        os.path.isfile(k) and os.path.samefile(k, file) for k in keep
    )


def data_source(config: Config) -> dict[str, Any]:
    """The arguments that the generated rows are a function of."""
    sizes = {"train": config.data.train_rows, "valid": _GENERATED_ROWS, "test": _GENERATED_ROWS}
    return {"task": config.data.task, "seed": config.seed, **sizes}


def data_hashes(before: RunRecord | None, source: dict[str, Any]) -> dict[str, str]:
    """sha256 of the generated splits by their names, as recorded or from the rows themselves."""
    names = {split: f"data/{split}.jsonl" for split in ("train", "valid", "test")}
    if before and before.made_from.get("data") == source:
        recorded = {name: before.files.get(name, ()) for name in names.values()}
        if all(len(hashes) == 1 for hashes in recorded.values()):
            return {name: hashes[0] for name, hashes in recorded.items()}
    hashes = grammar.split_hashes(
        source["task"], source["seed"], source["train"], source["valid"], source["test"]
    )
    return {names[split]: sha256 for split, sha256 in hashes.items()}


def same_run(before: Config, now: Config, free: Sequence[str]) -> list[str]:
    """The differences of two configurations of one run, but for the keys that may differ."""
    return list(_differences(to_dict(before), to_dict(now), free))


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str], path: str = ""
) -> Iterator[str]:
    for key, value in now.items():
        if f"{path}{key}" in free:
            continue
        if isinstance(value, dict):
            yield from _differences(before[key], value, free, f"{path}{key}.")
        # A vocabulary that is yet to be made has no size.
        elif before[key] != value and (f"{path}{key}", value) != ("model.vocab_size", 0):
            yield f"{path}{key}: {before[key]!r} there, {value!r} now"
