"""Source texts for the commands, from a file or standard input: one a line, or jsonl with `src`."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, BinaryIO, cast

from dlmone_fast.errors import DataError, UsageError
from dlmone_fast.textfiles import lines_of

MAX_LINE_BYTES = 16 * 2**20
_MOST_CALIBRATION = 1024


@dataclass(frozen=True)
class Source:
    """One input row: its text, and the object it came from (empty for plain text)."""

    text: str
    row: dict[str, Any]


def numbered_lines(path: str | None) -> Iterator[tuple[int, bytes]]:
    """Lines of a file or of standard input with their numbers, line ends removed.

    Raises:
        DataError: the file cannot be read, or a line is too long.
    """
    name, number = path or "standard input", 0
    try:
        with _open(path) as file:
            for line in lines_of(file, MAX_LINE_BYTES):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{name}, line {number}: longer than {MAX_LINE_BYTES} bytes; expected one "
                        "source a line"
                    )
                yield number, line.rstrip(b"\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{name}: cannot be read beyond line {number} ({error}); check the path and the file"
        ) from error


def is_jsonl(
    path: str | None, form: str, lines: Iterator[tuple[int, bytes]]
) -> tuple[bool, Iterator[tuple[int, bytes]]]:
    """Whether rows are objects, and the same lines again."""
    first = list(islice(lines, 1))
    lines = chain(first, lines)
    if form != "auto":
        return form == "jsonl", lines
    if path is not None and path.removesuffix(".gz").endswith((".jsonl", ".txt")):
        return path.removesuffix(".gz").endswith(".jsonl"), lines
    try:
        row = json.loads(first[0][1]) if first else None
    except (ValueError, RecursionError):
        row = None
    return isinstance(row, dict) and "src" in row, lines


def source_of(path: str | None, number: int, line: bytes, jsonl: bool) -> Source:
    """The source of a numbered line.

    Raises:
        DataError: it is no Unicode text, or no object with `src`; the message names file and line.
    """
    try:
        text = line.decode("utf-8")
        return _parsed(text) if jsonl else Source(text, {})
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 ({error.reason} at byte {error.start})"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise DataError(
        f"{path or 'standard input'}, line {number}: {reason}; correct or remove the line"
    )


def calibration_prompts(path: str | None, dtype: str) -> list[str] | None:
    """The prompts of a --calibration file, which int8 needs and nothing else reads.

    Raises:
        UsageError: int8 without a file, or a file without int8.
        DataError: the file cannot be read, or has no prompt.
    """
    if path is None:
        if dtype == "int8":
            raise UsageError(
                "--dtype int8: measures its scales on prompts; add --calibration FILE with some "
                "hundred, one a line or jsonl with src"
            )
        return None
    if dtype != "int8":
        raise UsageError(f"--calibration: belongs to --dtype int8, got {dtype}; leave it out")
    jsonl, lines = is_jsonl(path, "auto", numbered_lines(path))
    texts = [source_of(path, *line, jsonl).text for line in islice(lines, _MOST_CALIBRATION)]
    prompts = [text for text in texts if text.strip()]
    if not prompts:
        raise DataError(f"--calibration {path}: expected prompts, one a line, got none")
    return prompts


def _open(path: str | None) -> AbstractContextManager[BinaryIO]:
    if path is None:
        # What Python has for a standard input that was closed (`<&-`).
        if sys.stdin is None:
            raise DataError("standard input is closed; name a file to read instead (--input FILE)")
        return nullcontext(sys.stdin.buffer)
    return cast(BinaryIO, gzip.open(path, "rb")) if path.endswith(".gz") else open(path, "rb")


def _parsed(line: str) -> Source:
    """The source of a jsonl line, or ValueError with the reason alone."""
    if not line.strip():
        raise ValueError('blank line; expected {"src": "…"}')
    try:
        row = json.loads(line, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("src"), str):
        raise ValueError('expected an object with a string: {"src": "…"}')
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("lone surrogate: not Unicode text") from error
    return Source(row["src"], row)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")
