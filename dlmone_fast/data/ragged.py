"""Ragged int32 lists on disk: one flat `.npy` of ids and one of int64 offsets, written in a stream.

The arrays are plain `.npy` files, so numpy maps them into memory and nothing is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

import numpy as np

# magic, version 1.0, length of what follows as uint16; the header is padded to this size so
# that the final shape can be written over it.
_HEADER_BYTES = 128
_MAGIC = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")


class ArrayWriter:
    """Append pieces of a one-dimensional array to an `.npy` file of yet unknown length."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file = path.open("wb")
        self._file.write(bytes(_HEADER_BYTES))
        self._dtype = np.dtype(dtype)
        self._count = 0

    def append(self, values: Sequence[int]) -> None:
        array = np.asarray(values, dtype=self._dtype)
        self._file.write(array.tobytes())
        self._count += len(array)

    def close(self, *, complete: bool) -> None:
        """Write the header and fsync if `complete`; else leave a file that cannot be opened."""
        with self._file as file:
            if complete:
                shape = (self._count,)
                text = f"{{'descr': {self._dtype.str!r}, 'fortran_order': False, 'shape': {shape}}}"
                file.seek(0)
                file.write(_MAGIC + text.encode().ljust(_HEADER_BYTES - 11) + b"\n")
                file.flush()
                os.fsync(file.fileno())


class RaggedWriter:
    """Append lists of ids; offsets [n + 1] start at 0 and end at the number of ids."""

    def __init__(self, folder: Path, name: str) -> None:
        self._ids = ArrayWriter(folder / f"{name}_ids.npy", "<i4")
        self._offsets = ArrayWriter(folder / f"{name}_offsets.npy", "<i8")
        self._offsets.append([0])
        self._end = 0

    def append(self, lists: Sequence[Sequence[int]]) -> None:
        ends = list(accumulate((len(ids) for ids in lists), initial=self._end))
        self._ids.append(list(chain.from_iterable(lists)))
        self._offsets.append(ends[1:])
        self._end = ends[-1]

    def close(self, *, complete: bool) -> None:
        self._ids.close(complete=complete)
        self._offsets.close(complete=complete)
