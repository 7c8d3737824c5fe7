"""Source texts for the commands, from a file or standard input: one a line, or jsonl with `src`."""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, BinaryIO, cast

from dlmone_fast.errors import DataError, UsageError
from dlmone_fast.textfiles import lines_of

MAX_LINE_BYTES = 16 * 2**20
_MOST_NESTED = 200
_MOST_NAMES = 30
_MOST_CALIBRATION = 1024
_MOST_BLANK = 1000
# How an object or array begins that is torn, or goes on in the next lines.
_BEGUN = re.compile(r"\[\s*\{|\[\s*$|\[\s*\[\s*$|\{\s*$|\{\s*['\"]")


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
    """Whether rows are objects, and the same lines again.

    Raises:
        DataError: the first line that is not blank begins a JSON array, or an object in a file that
            is named as text: generated from as text, it would give answers to brackets.
    """
    name, read = path or "standard input", []
    if form != "auto":
        return form == "jsonl", lines
    named = path.removesuffix(".gz") if path is not None else ""
    if named.endswith(".jsonl"):
        return True, lines
    # The blank lines of a text are sources too; what follows them tells what it is.
    for number, line in islice(lines, _MOST_BLANK):
        read.append((number, line))
        if line.strip():
            break
    kind = _json_kind(read[-1][1]) if read else ""
    if kind == "array" or (kind and named.endswith(".txt")):
        raise DataError(
            f"{name}, line {read[-1][0]}: begins a JSON {kind}; expected one source a line, or an "
            'object {"src": "…"} a line (a file of them is named .jsonl): write it so, or give '
            "sample's --format text if these lines are text"
        )
    return kind == "object", chain(read, lines)


def _json_kind(line: bytes) -> str:
    """The kind of a line, or of what it begins: a JSON "object" or "array", or "": text."""
    text = line.decode("utf-8-sig", "replace").strip()
    try:
        value = json.loads(text)
    except RecursionError:
        return "array" if text.startswith("[") else "object"
    except ValueError:
        # One over several lines, or torn. Text begins with brackets too: "[sic]", "{name}".
        begun = _BEGUN.match(text)
        return "" if begun is None else "array" if begun[0].startswith("[") else "object"
    return "object" if isinstance(value, dict) else "array" if isinstance(value, list) else ""


def is_nested_too_deeply(value: Any, line: bytes) -> bool:
    """Whether a line's value is nested so deeply that writing it again may fail."""
    # Almost every line has fewer brackets altogether.
    if line.count(b"[") + line.count(b"{") <= _MOST_NESTED:
        return False
    level = [value]
    for _ in range(_MOST_NESTED):
        level = [part for one in level for part in _parts(one)]
    return bool(level)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def taken(fields: Iterable[str], added: Sequence[str]) -> str:
    """Why a row cannot get the fields that are added to it; "": none of them is its own.

    Args:
        fields: the row's own names.
        added: names of the command's.
    """
    own = [name for name in added if name in fields]
    if not own:
        return ""
    return (
        f"has {' and '.join(map(repr, own))} of its own, which the output would write over; give "
        "the new fields other names: --field-prefix out_"
    )


def source_of(path: str | None, number: int, line: bytes, jsonl: bool) -> Source:
    """The source of a numbered line.

    Raises:
        DataError: it is no Unicode text, or no object with `src`; the message names file and line.
    """
    try:
        text = line.decode("utf-8")
        return _parsed(text, line) if jsonl else Source(text, {})
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


def _parsed(line: str, raw: bytes) -> Source:
    """The source of a jsonl line, or ValueError with the reason alone."""
    if not line.strip():
        raise ValueError('blank line; expected {"src": "…"}')
    try:
        row = json.loads(line, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if isinstance(row, dict) and "src" not in row:
        names = ", ".join(list(row)[:_MOST_NAMES]) or "none"
        raise ValueError(f'expected an object with a string: {{"src": "…"}}, got the keys {names}')
    if not isinstance(row, dict) or not isinstance(row["src"], str):
        raise ValueError('expected an object with a string: {"src": "…"}')
    if is_nested_too_deeply(row, raw):
        raise ValueError("nested too deeply")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("lone surrogate: not Unicode text") from error
    return Source(row["src"], row)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")
