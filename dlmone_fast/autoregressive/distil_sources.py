"""The sources of a distillation: of a task folder, of further files, without those kept out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlmone_fast.autoregressive.distil_config import DistillationConfig
from dlmone_fast.data.rows import SPLITS, find_split, load_rows
from dlmone_fast.errors import DataError
from dlmone_fast.sources import numbered_lines, source_of


@dataclass(frozen=True)
class Sources:
    """Distinct sources in order, and how many were left out."""

    texts: list[str]
    excluded: int
    """Sources that --exclude names."""
    blank: int
    """Lines of --sources without text."""
    excluded_by: list[str]
    """Splits and files of --exclude."""


def read_sources(config: DistillationConfig) -> Sources:
    """The sources of a distillation.

    Raises:
        DataError: a file is missing or malformed, or no source is left.
    """
    rows = load_rows(config.data_dir, "train")
    texts = [row.src for row in rows]
    if config.both_directions:
        texts += [row.trg for row in rows]
    blank = 0
    if config.sources:
        for line in _lines(config.sources):
            if line:
                texts.append(line)
            else:
                blank += 1
    names = list(config.exclude) or _default_exclusion(config.data_dir)
    unwanted = {_same(text) for name in names for text in _excluded(name, config)}
    distinct = list(dict.fromkeys(texts))
    kept = [text for text in distinct if _same(text) not in unwanted]
    if not kept:
        raise DataError(
            f"--exclude {' '.join(names)}: leaves none of {len(distinct):,} sources; name the test "
            "sources alone"
        )
    return Sources(kept, len(distinct) - len(kept), blank, names)


def _default_exclusion(data_dir: str) -> list[str]:
    try:
        find_split(data_dir, "test")
    except DataError:
        return []
    return ["test"]


def _excluded(name: str, config: DistillationConfig) -> Iterable[str]:
    if name not in SPLITS:
        return _lines(name)
    rows = load_rows(config.data_dir, name)
    both: Sequence[str] = [row.trg for row in rows] if config.both_directions else []
    return [*(row.src for row in rows), *both]


def _lines(path: str) -> Iterator[str]:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; name one with a source a line, or a split")
    for number, line in numbered_lines(path):
        yield source_of(path, number, line, jsonl=False).text.strip()


def _same(text: str) -> str:
    """A key that sources share if they differ in case and white space alone."""
    return " ".join(text.split()).casefold()
