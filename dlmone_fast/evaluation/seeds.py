"""Which noise belongs to which row of a file."""

from __future__ import annotations

import hashlib

MAX_SEED = 2**64 - 1


def row_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """A 64-bit generation seed for each of `count` rows from row `first` on.

    A function of `seed` and the row's place in its file. With one seed for all rows they would
    share their noise, and no resampling of rows could show how much of a score is owed to it.
    """
    rows = range(first, first + count)
    digests = (hashlib.sha256(f"evaluate/{seed}/{row}".encode()).digest() for row in rows)
    return [int.from_bytes(digest[:8], "little") for digest in digests]
