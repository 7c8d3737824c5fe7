"""Names of an input's columns, checked before a job begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dlmone_fast.bulk.parquet import open_parquet
from dlmone_fast.bulk.shards import UNREADABLE, first_fields, input_files
from dlmone_fast.errors import DataError
from dlmone_fast.sources import taken

_MOST_SHOWN = 30


def check_columns(path: Path, column: str, id_column: str, added: Sequence[str]) -> None:
    """Refuse a job that would reject every row, or write over fields that the rows have.

    An input whose first row has the columns is looked at no further.

    Args:
        path: the input.
        column, id_column: what holds the source, and the id; "": no such column is asked for.
        added: names of the fields that the output adds.

    Raises:
        DataError: no row has a column, a file has one twice, or a row has a field of ours.
    """
    wanted = {"--column": column, "--id-column": id_column}
    missing = {flag: name for flag, name in wanted.items() if name}
    seen: dict[str, None] = {}
    reason, rows = "", False
    for file in input_files(path):
        for place, fields in _rows(file, added):
            rows = True
            if isinstance(fields, str):
                reason = reason or f"{place}: {fields}"
                continue
            seen.update(dict.fromkeys(fields))
            missing = {flag: name for flag, name in missing.items() if name not in fields}
            if not missing:
                break
    if not missing or not rows:
        return
    if not seen:
        raise DataError(f"{path}: no line is an object; {reason}; expected one object a line")
    flag, name = next(iter(missing.items()))
    raise DataError(
        f"{flag} {name}: no row of {path} has it; name one of its columns: {_listed(seen)}"
    )


def _rows(file: Path, added: Sequence[str]) -> Iterator[tuple[str, Sequence[str] | str]]:
    """Places with names of the fields there, or why there are none; one for a Parquet file."""
    try:
        if file.suffix == ".parquet":
            names = open_parquet(file).schema_arrow.names
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise DataError(
                    f"{file}: has the column {twice[0]!r} more than once, and a row keeps one of a "
                    "name; rename the others"
                )
            found: Iterator[tuple[int, Sequence[str] | str]] = iter([(0, names)])
        else:
            found = first_fields(file)
        for number, fields in found:
            place = f"{file.name}:{number}"
            if not isinstance(fields, str) and (clash := taken(fields, added)):
                raise DataError(f"{place}: {clash}")
            yield place, fields
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"{file}: cannot be read ({error}); copy it again") from error


def _listed(names: dict[str, None]) -> str:
    shown = ", ".join(list(names)[:_MOST_SHOWN])
    return shown if len(names) <= _MOST_SHOWN else f"{shown}, and {len(names) - _MOST_SHOWN} more"
