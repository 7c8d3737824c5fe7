"""An input cut into shards: which rows of which file, and reading them."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from dlmone_fast.bulk.parquet import AsText, open_parquet, parquet_rows
from dlmone_fast.errors import DataError
from dlmone_fast.files import why_not_there
from dlmone_fast.sources import is_nested_too_deeply
from dlmone_fast.textfiles import lines_of

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
MAX_LINE_BYTES = 16 * 2**20
_READ_BYTES = 1 << 20
# What reading raises of a damaged file, pyarrow's refusals included.
UNREADABLE = (OSError, EOFError, ValueError, NotImplementedError, zlib.error)
# Enough to find a malformed line by.
_SHOWN_BYTES = 4000


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of one file.

    Attributes:
        index: place among all shards, which names the output.
        file: path of the input file.
        first: number of the first row in its file, from 0.
        count: how many rows; None: to the end of the file.
        offset: byte of a plain jsonl file where the first row begins.
    """

    index: int
    file: str
    first: int = 0
    count: int | None = None
    offset: int = 0

    @property
    def name(self) -> str:
        """What its output files are called, without an ending."""
        return f"part-{self.index:06d}"

    def as_item(self) -> dict[str, Any]:
        """Its fields, for a worker to build it again."""
        return asdict(self)


@dataclass(frozen=True)
class InputRow:
    """A row of the input: its id, what is to be kept of it, and its source or why it has none;
    how a line begins that is no row at all."""

    id: str
    fields: dict[str, Any]
    source: str = ""
    reason: str = ""
    line: str | None = None


@dataclass(frozen=True)
class _Malformed:
    line: bytes
    reason: str


def input_files(path: Path) -> list[Path]:
    """The file, or a folder's input files in order of their names.

    Raises:
        DataError: there is none, or the ending is unknown.
    """
    if not os.path.exists(path):
        raise DataError(
            f"{path}: not found ({why_not_there(path)}); name a file or folder of "
            f"{', '.join(SUFFIXES)}"
        )
    try:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); correct its rights, or name another folder"
        ) from error
    files = [file for file in inside if file.name.endswith(SUFFIXES)]
    if not files:
        raise DataError(f"{path}: expected {', '.join(SUFFIXES)}, or a folder of such files")
    return files


def plan_shards(path: Path, rows: int) -> list[Shard]:
    """Shards of about `rows` rows each; a gzipped file is one, for none can begin within it.

    Raises:
        DataError: a file cannot be read.
    """
    shards: list[Shard] = []
    for file in input_files(path):
        try:
            for first, count, offset in _pieces(file, rows):
                shards.append(Shard(len(shards), str(file), first, count, offset))
        except UNREADABLE as error:
            raise DataError(f"{file}: cannot be read ({error}); copy it again") from error
    return shards


def read_shard(shard: Shard, column: str, id_column: str) -> Iterator[InputRow]:
    """The shard's rows; what has no usable source says why instead of ending the job.

    Raises:
        DataError: the file itself cannot be read on.
    """
    file, number = Path(shard.file), shard.first
    rows: Iterator[dict[str, Any] | _Malformed] = _json_rows(shard)
    if file.suffix == ".parquet":
        assert shard.count is not None
        rows = parquet_rows(file, shard.first, shard.count)
    try:
        for number, row in enumerate(rows, shard.first):
            yield _input_row(f"{file.name}:{number}", row, column, id_column)
    except UNREADABLE as error:
        raise DataError(
            f"{file}: cannot be read beyond row {number} ({error}); copy it again"
        ) from error


def first_fields(file: Path) -> Iterator[tuple[int, Sequence[str] | str]]:
    """Numbers of a jsonl file's rows, with the names of their fields or why they have none."""
    for number, row in enumerate(_json_rows(Shard(0, str(file)))):
        yield number, row.reason if isinstance(row, _Malformed) else list(row)


def _pieces(file: Path, rows: int) -> Iterator[tuple[int, int | None, int]]:
    """First row, rows and byte offset of each shard of a file."""
    if file.suffix == ".gz":
        yield 0, None, 0
    elif file.suffix == ".parquet":
        total = open_parquet(file).metadata.num_rows
        for first in range(0, total, rows):
            yield first, min(rows, total - first), 0
    else:
        starts = list(_line_starts(file, rows))
        for index, offset in enumerate(starts):
            last = index == len(starts) - 1
            yield index * rows, None if last else rows, offset


def _line_starts(file: Path, every: int) -> Iterator[int]:
    """Byte offsets of the lines 0, every, 2·every, … of a file."""
    place, line = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            if place == 0:
                yield 0
            found = -1
            while (found := block.find(b"\n", found + 1)) >= 0:
                line += 1
                # A line begins there only if anything follows.
                if line % every == 0 and (found + 1 < len(block) or stream.peek(1)):
                    yield place + found + 1
            place += len(block)


def _json_rows(shard: Shard) -> Iterator[dict[str, Any] | _Malformed]:
    """Objects, or the line that is none."""
    with _open(Path(shard.file)) as stream:
        stream.seek(shard.offset)
        for line in islice(_lines(stream, shard.offset), shard.count):
            row = _object(line)
            yield _Malformed(line, row) if isinstance(row, str) else row


def _lines(stream: BinaryIO, offset: int) -> Iterator[bytes]:
    for line in lines_of(stream, MAX_LINE_BYTES, from_start=offset == 0):
        yield line
        # The rest of a line that is too long is not a line.
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES + 1)


def _open(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")


def _object(line: bytes) -> dict[str, Any] | str:
    """The line's object, or the reason why it is none."""
    if len(line) > MAX_LINE_BYTES:
        return f"longer than {MAX_LINE_BYTES} bytes"
    try:
        found = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "lone surrogate: not Unicode text"
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    except RecursionError:
        return "nested too deeply"
    except ValueError as error:
        return f"not JSON ({error})"
    if is_nested_too_deeply(found, line):
        return "nested too deeply"
    return found if isinstance(found, dict) else f"expected an object, got {found!r:.80}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _input_row(
    place: str, row: dict[str, Any] | _Malformed, column: str, id_column: str
) -> InputRow:
    if isinstance(row, _Malformed):
        # Bytes that are no UTF-8 show as \xNN.
        line = row.line[:_SHOWN_BYTES].decode("utf-8", "backslashreplace").rstrip("\r\n")
        return InputRow(place, {}, reason=row.reason, line=line)
    identity, source = row.get(id_column) if id_column else place, row.get(column)
    if isinstance(identity, (bool, AsText)) or not isinstance(identity, (str, int)):
        return InputRow(place, row, reason=f"{id_column!r} is no string or whole number")
    if isinstance(source, AsText):
        return InputRow(str(identity), row, reason=f"{column!r} is no Unicode text")
    if not isinstance(source, str):
        return InputRow(str(identity), row, reason=f"{column!r} is no string")
    return InputRow(str(identity), row, source)
