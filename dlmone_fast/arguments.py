"""Checks of arguments that functions of several layers take."""

from __future__ import annotations

import os
from collections.abc import Iterable

from dlmone_fast.errors import UsageError


def refuse_one(name: str, value: object, error: type[UsageError] = UsageError) -> None:
    """Refuse one text, or what is no list at all, where a list of them is expected.

    A str is an iterable of str too: taken for a list, it would be read letter by letter.

    Raises:
        error: `value` is a str, bytes, a path or no iterable.
    """
    if isinstance(value, (str, bytes, bytearray, os.PathLike)) or not isinstance(value, Iterable):
        raise error(f"{name}: expected a list, got one {type(value).__name__}; wrap it in a list")
