"""Reading text files: UTF-8, with or without the byte-order mark that other programs put first.

Editors and spreadsheets on Windows write the mark (EF BB BF). Read as text it becomes a character
of the first key or word, and the first line is another one than its author wrote.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

BOM = codecs.BOM_UTF8


def decoded(content: bytes) -> str:
    """The text of a whole file; a byte-order mark is no part of it.

    Raises:
        UnicodeDecodeError: it is not UTF-8; `object` and `start` count from behind the mark.
    """
    return content.decode("utf-8-sig")


def lines_of(stream: BinaryIO, limit: int, *, from_start: bool = True) -> Iterator[bytes]:
    """The lines of a file, line ends kept; without a byte-order mark, which only its start has.

    A line of more than `limit` bytes comes in pieces of `limit` + 1, so that memory is bounded. A
    file that holds the mark alone has no line. The stream may be a pipe.
    """
    line = stream.readline(limit + 1)
    if from_start and line.startswith(BOM):
        # The mark takes nothing of the line's own room.
        line = line.removeprefix(BOM)
        if not line.endswith(b"\n"):
            line += stream.readline(limit + 1 - len(line))
    while line:
        yield line
        line = stream.readline(limit + 1)
