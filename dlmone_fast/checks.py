"""Numbers as arguments: whole numbers and real ones of any library are welcome, booleans are not.

`True` passes for 1 in Python and numpy's float32 is no float, so that every check of its own gets
one of the two wrong.
"""

from __future__ import annotations

import math
import operator
from numbers import Real


def as_whole(value: object) -> int | None:
    """The value as an int, if it is a whole number (of Python, numpy or torch); else None."""
    # First: a compiler cannot follow operator.index of an enumeration.
    if isinstance(value, int):
        return None if isinstance(value, bool) else int(value)
    if _is_boolean(value):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_real(value: object) -> float | None:
    """The value as a float, if it is a real number (of Python or numpy); else None.

    NaN and the infinities are floats, and what is too large for one is infinite: compare with
    bounds.
    """
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether the value is a whole number from `low` to `high`, both included."""
    number = as_whole(value)
    return number is not None and low <= number <= high


def _is_boolean(value: object) -> bool:
    # A torch tensor of one boolean is an index to Python.
    return "bool" in str(getattr(value, "dtype", ""))
