"""Rows of Parquet files: a value that Python cannot hold costs no row but its own a thing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


class AsText(str):
    """A cell that Python has no value for, such as a date in the year 150,000, as text."""


def open_parquet(file: Path) -> Any:
    """The file as pyarrow reads it; pyarrow comes with Ray."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file)


def parquet_rows(file: Path, first: int, count: int) -> Iterator[dict[str, Any]]:
    """Rows `first` … `first + count - 1` of a file, in order.

    Raises:
        OSError, ValueError, NotImplementedError: a part of the file is damaged, or of a kind that
            pyarrow does not read.
    """
    parquet, before = open_parquet(file), 0
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        start, stop = max(first - before, 0), min(first + count - before, size)
        if start < stop:
            table = parquet.read_row_group(group).slice(start, stop - start)
            columns = [_cells(column) for column in table.columns]
            for cells in zip(*columns, strict=True):
                yield dict(zip(table.column_names, cells, strict=True))
        before += size


def _cells(column: Any) -> list[Any]:
    # A column at a time is fast; one bad cell of it ends that.
    try:
        return list(column.to_pylist())
    except Exception:
        return [_cell(scalar) for scalar in column]


def _cell(scalar: Any) -> Any:
    # Beside its own errors pyarrow passes on those of datetime, zoneinfo and pandas.
    try:
        return scalar.as_py()
    except Exception:
        return _as_text(scalar)


def _as_text(scalar: Any) -> Any:
    import pyarrow

    if isinstance(scalar, pyarrow.StructScalar):
        return {name: _cell(scalar[name]) for name in scalar}
    if isinstance(scalar, pyarrow.ListScalar):
        return [_cell(part) for part in scalar.values]
    if isinstance(scalar, (pyarrow.DictionaryScalar, pyarrow.ExtensionScalar)):
        return _cell(scalar.value)
    if isinstance(scalar, pyarrow.BinaryScalar):
        # Bytes that are no UTF-8 show as \xNN.
        return AsText(scalar.as_buffer().to_pybytes().decode("utf-8", "backslashreplace"))
    return AsText(f"{getattr(scalar, 'value', 'unreadable')} ({scalar.type})")
