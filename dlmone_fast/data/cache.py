"""A split tokenised once: memory-mapped ids, keyed by the data's and the tokenizer's hashes.

A cache is built in a hidden folder, fsynced and renamed, so a folder of the final name is
complete; one that does not have the hashes of its `meta.json` is built again. Hidden folders of
killed builds are never read and may be deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlmone_fast.aligned_tokenizer import AlignedTokenizer
from dlmone_fast.data.fidelity import Fidelity
from dlmone_fast.data.ragged import RaggedWriter
from dlmone_fast.data.rows import Row, read_rows
from dlmone_fast.errors import DataError
from dlmone_fast.files import fsync_directory, write_atomically
from dlmone_fast.text_tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CHUNK_ROWS = 2048
_SHOWN_LINES = 5
_ARRAYS = {"src_ids": "<i4", "src_offsets": "<i8", "trg_ids": "<i4", "trg_offsets": "<i8"}


@dataclass(frozen=True)
class TokenCache:
    """`[CLS] … [SEP]` ids of both sides, ragged: row i is `ids[offsets[i]:offsets[i + 1]]`.

    With `both_directions`, row N + i of the N stored ones is row i with its sides exchanged.
    `dropped` rows of the file are not here: they cannot be aligned.
    """

    folder: Path
    src_ids: npt.NDArray[np.int32]
    src_offsets: npt.NDArray[np.int64]
    trg_ids: npt.NDArray[np.int32]
    trg_offsets: npt.NDArray[np.int64]
    both_directions: bool = False
    dropped: int = 0

    @property
    def stored(self) -> int:
        """Rows on disk."""
        return len(self.src_offsets) - 1

    def __len__(self) -> int:
        return 2 * self.stored if self.both_directions else self.stored

    def exchanged(self) -> TokenCache:
        """The same rows with source and target exchanged, in the same memory."""
        return TokenCache(
            self.folder, self.trg_ids, self.trg_offsets, self.src_ids, self.src_offsets
        )

    def pair(self, row: int) -> tuple[list[int], list[int]]:
        """Return the source's and the target's ids of one row, untruncated."""
        if row >= self.stored and self.both_directions:
            return self.exchanged().pair(row - self.stored)
        src = self.src_ids[self.src_offsets[row] : self.src_offsets[row + 1]]
        trg = self.trg_ids[self.trg_offsets[row] : self.trg_offsets[row + 1]]
        return src.tolist(), trg.tolist()


def open_or_build(
    data_path: str | Path, tokenizer: TextTokenizer, cache_dir: str | Path
) -> TokenCache:
    """Open the token cache of one data file under `cache_dir`, building it if need be.

    Memory stays bounded whatever the file's size. With an `AlignedTokenizer`, rows that cannot be
    aligned are left out, counted in `meta.json`, and said in the log when the cache is built. Raise
    DataError for data that cannot be read or tokenised, of which no row is left, and where the
    cache cannot be written.
    """
    data_path, cache_dir = Path(data_path), Path(cache_dir)
    identity = {
        "format_version": FORMAT_VERSION,
        "data_sha256": _file_hash(data_path),
        "tokenizer_sha256": tokenizer.hash,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir / key
    cache = _opened(folder, identity)
    if cache is not None:
        return cache
    try:
        _build(folder, identity, data_path, tokenizer)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot write the token cache ({error}); free space or choose another "
            "cache folder"
        ) from error
    cache = _opened(folder, identity)
    if cache is None:
        raise DataError(f"{folder}: damaged right after it was written; check the disk")
    return cache


def _opened(folder: Path, identity: dict[str, Any]) -> TokenCache | None:
    """Return the cache in `folder`, or None where it is missing, foreign or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        # The hashes as well as the data's: a flipped id would be trained on without a word.
        if meta["identity"] != identity or meta["sha256"] != _hashes(folder):
            return None
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in _ARRAYS
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError, DataError):
        return None
    if any(array.dtype.str != _ARRAYS[name] or array.ndim != 1 for name, array in arrays.items()):
        return None
    for side in ("src", "trg"):
        ids, offsets = arrays[f"{side}_ids"], arrays[f"{side}_offsets"]
        if len(offsets) - 1 != meta.get("rows") or offsets[0] != 0 or offsets[-1] != len(ids):
            return None
    return TokenCache(folder=folder, **arrays, dropped=meta.get("dropped", 0))


def _build(
    folder: Path, identity: dict[str, Any], data_path: Path, tokenizer: TextTokenizer
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".building-{folder.name}-", dir=folder.parent))
    try:
        rows, dropped = _write_arrays(building, data_path, tokenizer)
        _say_dropped(data_path, rows, dropped)
        meta = {
            "identity": identity, "rows": rows, "dropped": len(dropped),
            "sha256": _hashes(building),
        }  # fmt: skip
        write_atomically(building / "meta.json", [json.dumps(meta, indent=2).encode()])
        _install(building, folder, identity)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _install(building: Path, folder: Path, identity: dict[str, Any]) -> None:
    """Give the finished folder its name, unless another process was first."""
    if folder.exists() and _opened(folder, identity) is None:
        shutil.rmtree(folder)
    try:
        os.rename(building, folder)
    except OSError:
        if _opened(folder, identity) is None:
            raise
    fsync_directory(folder.parent)


def _write_arrays(folder: Path, data_path: Path, tokenizer: TextTokenizer) -> tuple[int, list[int]]:
    """Write the ids; return the rows written and the lines of those left out."""
    src, trg = RaggedWriter(folder, "src"), RaggedWriter(folder, "trg")
    count, dropped, complete, fidelity = 0, list[int](), False, Fidelity()
    try:
        for chunk in _chunks(_with_progress(_fitting(data_path, tokenizer), data_path.name)):
            sources, targets, without = _encoded(chunk, tokenizer)
            src.append(sources)
            trg.append(targets)
            count += len(sources)
            dropped += without
            if tokenizer.kind == "wordpiece":
                fidelity.add(tokenizer, [row.src for row in chunk], sources)
                fidelity.add(tokenizer, [row.trg for row in chunk], targets)
        complete = True
    finally:
        src.close(complete=complete)
        trg.close(complete=complete)
    if tokenizer.kind == "wordpiece":
        with contextlib.suppress(OSError):
            print(fidelity.line(data_path.name), file=sys.stderr)
    return count, dropped


def _encoded(
    rows: list[Row], tokenizer: TextTokenizer
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Ids of both sides, and the lines of rows without any."""
    sources, targets = [row.src for row in rows], [row.trg for row in rows]
    if not isinstance(tokenizer, AlignedTokenizer):
        return tokenizer.encode(sources), tokenizer.encode(targets), []
    aligned = tokenizer.encode_targets(sources, targets)
    kept = [source for source, ids in zip(sources, aligned, strict=True) if ids is not None]
    dropped = [row.line for row, ids in zip(rows, aligned, strict=True) if ids is None]
    return tokenizer.encode(kept), [ids for ids in aligned if ids is not None], dropped


def _say_dropped(path: Path, kept: int, dropped: list[int]) -> None:
    """Tell how many rows are left out; refuse a file of which nothing is left."""
    if not dropped:
        return
    lines = ", ".join(map(str, dropped[:_SHOWN_LINES])) + (", …" if dropped[_SHOWN_LINES:] else "")
    reason = (
        f"{path}: {len(dropped)} of {kept + len(dropped)} rows "
        f"({len(dropped) / (kept + len(dropped)):.2%}) cannot be aligned, with a letter or symbol "
        "that the training split has not, or more symbols than their letters can hold (lines "
        f"{lines})"
    )
    if not kept:
        raise DataError(f"{reason}; give words as src, and their symbols with spaces as trg")
    logger.warning("%s; they are left out", reason)


def _fitting(path: Path, tokenizer: TextTokenizer) -> Iterator[Row]:
    for row in read_rows(path):
        longest = max(len(row.src), len(row.trg))
        if longest > tokenizer.max_chars:
            raise DataError(
                f"{path}, line {row.line}: {longest} characters, the limit is "
                f"{tokenizer.max_chars}; shorten or remove the row"
            )
        yield row


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


def _with_progress(rows: Iterable[Row], name: str) -> Iterator[Row]:
    if not sys.stderr.isatty():
        return iter(rows)
    from tqdm import tqdm

    return iter(tqdm(rows, desc=f"tokenising {name}", unit=" rows", leave=False))


def _hashes(folder: Path) -> dict[str, str]:
    return {name: _file_hash(folder / f"{name}.npy") for name in _ARRAYS}


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); check the path") from error
