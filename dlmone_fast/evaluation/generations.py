"""DiffuSeq's generation files: one jsonl a seed, with `recover`, `reference` and `source`."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlmone_fast.arguments import refuse_one
from dlmone_fast.data.rows import with_first
from dlmone_fast.errors import DataError, UsageError
from dlmone_fast.files import prove_writable, real_path, write_atomically
from dlmone_fast.textfiles import lines_of

KEYS = ("source", "reference", "recover")
# Far above any sentence pair: a file of another kind is refused, not loaded.
MAX_LINE_BYTES = 1 << 20


# Source, reference, and all references.
_Pair = tuple[str, str, tuple[str, ...]]


@dataclass(frozen=True)
class GenerationSet:
    """Cleaned texts: n `sources` and `references`, and `candidates` [files][n].

    `refs` holds all references of each row, the one in `references` first.
    """

    sources: list[str]
    references: list[str]
    candidates: list[list[str]]
    refs: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.refs:
            object.__setattr__(self, "refs", [[text] for text in self.references])


def clean_text(text: str, *, drop_padding: bool = False) -> str:
    """DiffuSeq's clean-up: strip, then remove every [CLS] and [SEP] (and [PAD]).

    Spaces that stood beside a removed mark stay, and the average length counts them, as there.
    """
    text = text.strip().replace("[CLS]", "").replace("[SEP]", "")
    return text.replace("[PAD]", "") if drop_padding else text


def read_generations(paths: Sequence[str | os.PathLike[str]]) -> GenerationSet:
    """Read one or more generation files (.jsonl or .jsonl.gz) of the same rows, one a seed.

    Row i of every file must have the same source and references: `reference`, and further ones in a
    list `refs` where the data have them. Pairs that occur twice within
    the data are kept, since published test sets have some. Raises `DataError` with file, line
    and reason for anything else than well-formed, corresponding, non-empty files.
    """
    refuse_one("generations", paths)
    if not paths:
        raise UsageError("generations: expected at least 1 file, got 0.")
    files = [Path(path) for path in paths]
    _refuse_repeated_files(files)
    first: list[_Pair] = []
    candidates = []
    for file in files:
        rows = list(_read_rows(file))
        pairs = [pair for pair, _ in rows]
        if not pairs:
            raise DataError(
                f"{file}: expected generations, got an empty file; generate them again."
            )
        if first:
            _check_same_rows(files[0], first, file, pairs)
        first = first or pairs
        candidates.append([text for _, text in rows])
    sources, references, refs = (list(column) for column in zip(*first, strict=True))
    return GenerationSet(sources, references, candidates, [list(known) for known in refs])


def _refuse_repeated_files(files: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for file in files:
        if real_path(file) in seen:
            raise DataError(
                f"{file}: given twice, which would count one candidate as two; name each file once."
            )
        seen.add(real_path(file))


def _read_rows(file: Path) -> Iterator[tuple[_Pair, str]]:
    opener: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rb") as stream:
            for number, line in enumerate(lines_of(stream, MAX_LINE_BYTES), start=1):
                yield _parse(line, f"{file}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{file}: cannot be read ({reason}); check the path.") from error


def _parse(line: bytes, place: str) -> tuple[_Pair, str]:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{place}: longer than {MAX_LINE_BYTES} bytes; expected one pair a line.")
    try:
        row = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = "empty line" if not line.strip() else str(error)
        raise DataError(f"{place}: expected one JSON object in UTF-8: {reason}.") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object, got {type(row).__name__}.")
    source, reference, recovered = (_text(row, key, f"{place}: key {key!r}") for key in KEYS)
    refs = row.get("refs") or []
    if not isinstance(refs, list):
        raise DataError(
            f"{place}: key 'refs': expected a list of strings, got {type(refs).__name__}."
        )
    given = dict(enumerate(refs))
    known = [_text(given, i, f"{place}: key 'refs[{i}]'") for i in given]
    return (source, reference, with_first(reference, known)), recovered


def _text(row: dict[Any, Any], key: Any, place: str) -> str:
    if not isinstance(row.get(key), str):
        raise DataError(f"{place}: expected a string, {_instead(row, key)}.")
    text = clean_text(row[key], drop_padding=key == "recover")
    if not _is_unicode(text):
        raise DataError(f"{place}: expected text, it holds a lone surrogate.")
    return text


def _instead(row: dict[Any, Any], key: Any) -> str:
    if key not in row:
        return "it is missing"
    return "it is null" if row[key] is None else f"got {type(row[key]).__name__}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_same_rows(first_file: Path, first: list[_Pair], file: Path, pairs: list[_Pair]) -> None:
    """Refuse a file whose rows are not those of the first, naming the first line that differs."""
    for number, (expected, found) in enumerate(zip(first, pairs, strict=False), start=1):
        if expected == found:
            continue
        key = "source" if expected[0] != found[0] else "reference"
        also = ""
        if found in pairs[: number - 1]:
            also = f" (it repeats line {pairs.index(found) + 1})"
        raise DataError(
            f"{file}, line {number}: its {key} is not that of {first_file}, line {number}{also}; "
            "files of one evaluation must hold the same rows in the same order."
        )
    if len(first) != len(pairs):
        raise DataError(
            f"{file}, line {min(len(first), len(pairs)) + 1}: expected {len(first)} rows as in "
            f"{first_file}, got {len(pairs)}; files of one evaluation must hold the same rows."
        )


def write_generations(
    path: str | os.PathLike[str],
    sources: Sequence[str],
    references: Sequence[str | Sequence[str]],
    recovered: Sequence[str],
) -> None:
    """Write one generation file that `read_generations` and DiffuSeq's evaluation read.

    Several references of a row stand in a list `refs` beside `reference`, the first of them. The
    file appears whole or not at all; an existing one is replaced.
    """
    refuse_one("sources", sources)
    refuse_one("references", references)
    refuse_one("recovered", recovered)
    lines = []
    for source, given, text in zip(sources, references, recovered, strict=True):
        known = [given] if isinstance(given, str) else list(given)
        row = {"recover": text, "reference": known[0], "source": source}
        lines.append(json.dumps(row | ({"refs": known} if len(known) > 1 else {})))
    write_text(path, "\n".join(lines) + "\n")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise the `DataError` of `write_text` before there is anything to write."""
    with _writing(Path(path)):
        prove_writable(path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, whole or not at all; `DataError` says why it cannot be."""
    target = Path(path)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, [text.encode("utf-8")])


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written ({error.strerror}); what was there is unchanged. "
            "Free space or name another place."
        ) from error
