"""Reading every row of every split before anything is made of them."""

from __future__ import annotations

import os
from pathlib import Path

from dlmone_fast.data.rows import SPLITS, find_split, read_rows
from dlmone_fast.errors import DataError


def check_splits(data_dir: str | Path, max_chars: int, required: tuple[str, ...] = SPLITS) -> None:
    """Raise for the first row of a folder's splits that cannot be used.

    A row that only the table after hours of training would read is found now.

    Args:
        max_chars: longest text in characters.
        required: splits that must be there; the others are checked where they are.

    Raises:
        DataError: a file is missing, or a row is malformed or too long; with file and line.
    """
    for split in SPLITS:
        names = (f"{split}.jsonl", f"{split}.jsonl.gz")
        if split not in required and not any(
            os.path.isfile(Path(data_dir, name)) for name in names
        ):
            continue
        path = find_split(data_dir, split)
        for row in read_rows(path):
            longest = max(len(row.src), len(row.trg))
            if longest > max_chars:
                raise DataError(
                    f"{path}, line {row.line}: {longest} characters, the limit is {max_chars}; "
                    "shorten or remove the row, or raise data.max_chars"
                )
