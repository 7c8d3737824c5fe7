"""Reading sentence pairs: folders of {train,valid,test}.jsonl or .jsonl.gz, DiffuSeq's format."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

from dlmone_fast.checks import as_whole
from dlmone_fast.errors import DataError, UsageError
from dlmone_fast.textfiles import lines_of

SPLITS = ("train", "valid", "test")
MAX_LINE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """One pair, both sides stripped; `refs` holds further references where the data has them."""

    src: str
    trg: str
    line: int
    refs: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """All references: the target, and what `refs` holds beside it."""
        return with_first(self.trg, self.refs)


def with_first(reference: str, refs: Sequence[str]) -> tuple[str, ...]:
    """`refs` with `reference` as the first of them, which need not be there twice."""
    others = list(refs)
    if reference in others:
        others.remove(reference)
    return (reference, *others)


def find_split(data_dir: str | Path, split: str) -> Path:
    """Return `data_dir/split.jsonl`, or `….jsonl.gz`; where both exist the plain file wins.

    The plain one is what somebody unpacked and maybe edited.
    """
    if split not in SPLITS:
        raise UsageError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    directory = Path(data_dir)
    if not directory.is_dir():
        raise DataError(f"{directory}: no such folder; --data-dir wants one with {split}.jsonl")
    for suffix in (".jsonl", ".jsonl.gz"):
        path = directory / f"{split}{suffix}"
        if path.is_file():
            return path
    raise DataError(
        f"{directory}: neither {split}.jsonl nor {split}.jsonl.gz is there; write one with an "
        'object a line: {"src": "…", "trg": "…"}'
    )


def read_rows(path: str | Path) -> Iterator[Row]:
    """Stream the rows of one file in order, in memory bounded by its longest line.

    Raise DataError (file, line, reason) at the first row that is not an object with non-empty
    strings `src` and `trg`, and at the end of a file without rows. Blank lines are such rows.
    """
    path = Path(path)
    number = 0
    try:
        with _open(path) as file:
            for line in lines_of(file, MAX_LINE_BYTES):
                number += 1
                yield _row(path, number, line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read beyond line {number} ({error}); the file is missing, cut "
            "short or damaged: copy it again"
        ) from error
    if number == 0:
        raise DataError(f"{path}: empty; a split needs at least one row")


def load_rows(data_dir: str | Path, split: str, limit: int | None = None) -> list[Row]:
    """Return the rows of a split, at most the first `limit`."""
    if limit is not None and (as_whole(limit) or 0) < 1:
        raise UsageError(f"limit: expected a whole number of at least 1, got {limit!r}")
    return list(islice(read_rows(find_split(data_dir, split)), limit))


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        return _parsed(number, line)
    except ValueError as error:
        raise DataError(
            f'{path}, line {number}: {error}; expected {{"src": "…", "trg": "…"}}: correct or '
            "remove the line"
        ) from error


def _parsed(number: int, line: bytes) -> Row:
    """Return the row, or raise ValueError with the reason alone."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES} bytes")
    if not line.strip():
        raise ValueError("blank line")
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {type(content).__name__}")
    refs = content.get("refs")
    if refs is not None and not isinstance(refs, list):
        raise ValueError(f"key 'refs': expected a list of strings, got {type(refs).__name__}")
    return Row(
        src=_text("src", _value(content, "src")),
        trg=_text("trg", _value(content, "trg")),
        line=number,
        refs=tuple(_text(f"refs[{i}]", ref) for i, ref in enumerate(refs or [])),
    )


def _value(content: dict[str, object], key: str) -> object:
    if key not in content:
        raise ValueError(f"key {key!r} is missing")
    return content[key]


def _text(key: str, value: object) -> str:
    if value is None:
        raise ValueError(f"key {key!r} is null")
    if not isinstance(value, str):
        raise ValueError(f"key {key!r}: expected a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"key {key!r}: lone surrogate {value[error.start]!r} at character {error.start}"
        ) from error
    stripped = value.strip()
    if not stripped:
        raise ValueError(f"key {key!r} is empty")
    return stripped
