"""Prompts that nobody means well with, as families that a random source draws from."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import tiny

MOST_CHARS = 20_000
"""Characters that a prompt of the tests' model may have."""

_SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", "[unused0]", "</s>", "<|endoftext|>")
_INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad\u034f\u061c\u180e"
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_COMBINING = "\u0300\u0301\u0308\u0336\u0489\u20dd\ufe0f\U000e0101"
_WIDE = "中文字𠀀각힣ﷺﬃİßſ\u1e9e🏳️‍🌈👩‍👩‍👧"
_CONTROL = "".join(map(chr, [*range(32), *range(127, 160)]))


class Text(str):
    """A str of another type."""

    __slots__ = ()


def _repeated(source: Random, alphabet: str, most: int = 3_000) -> str:
    return "".join(source.choices(alphabet, k=source.randint(1, most)))


def blank(source: Random) -> Any:
    return _repeated(source, " \t\n\r\u00a0\u2003\u3000\x85\x1c", 300)[
        source.choice([0, -1, 300]) :
    ]


def control(source: Random) -> Any:
    return _repeated(source, _CONTROL + "ba")


def surrogates(source: Random) -> Any:
    text = _repeated(source, "ba \ud800\udbff\udc00\udfff")
    return source.choice(
        [
            text,
            "ba " * source.randint(0, 6000) + "\ud83d",
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
        ]
    )


def invisible(source: Random) -> Any:
    return _repeated(source, _INVISIBLE + _DIRECTIONS + "ba ")


def combining(source: Random) -> Any:
    return "a" + _repeated(source, _COMBINING, 15_000)


def wide(source: Random) -> Any:
    return _repeated(source, _WIDE)


def anything(source: Random) -> Any:
    """Any code points, those of nothing and lone surrogates included."""
    return "".join(chr(source.randrange(0x110000)) for _ in range(source.randint(1, 400)))


def special(source: Random) -> Any:
    parts = [*_SPECIAL, *(s.lower() for s in _SPECIAL), "##", "[", "]", "ba", " ", "\u200b", "SEP"]
    return "".join(source.choices(parts, k=source.randint(1, 60)))


# Punctuation, letters and ideographs of many scripts, of all planes.
_UNITS = (
    "ba ", "x", "。", "中", ".", "a.", "[SEP]", "😀 ", "да ", "\x00", "\ud800",
    "\u061f", "\u0627\u060c", "\u0964", "\u0915\u0964", "\u05be", "\u05d0\u05c3", "\u05d0 ",
    "\u0e01", "\u104a", "\u1362", "\u00bf", "\u2e2e", "\uff61", "\u3131", "\u0301",
    "\U00020000", "\U0002a700", "\U00030000", "\U0002f800", "\U00010100", "\U000102e1 ",
    "\U0001e900",
)  # fmt: skip


def long(source: Random) -> Any:
    """Around the limit of characters, and far above it."""
    unit = source.choice(_UNITS)
    size = source.choice([MOST_CHARS - 1, MOST_CHARS, MOST_CHARS + 1, 10**5, 10**6, 10**7])
    return (unit * (size // len(unit) + 1))[:size]


def markup(source: Random) -> Any:
    return source.choice([
        "'; DROP TABLE prompts; --", "<script>alert(1)</script>", "${jndi:ldap://x/a}", "{{7*7}}",
        "%s%s%n%n", "../../etc/passwd\0.txt", "\x1b[2J\x1b]0;x\x07", "$(reboot)", "`id`", "NaN",
        "__import__('os').system('id')", "\\u0000\\x00", "-1e999", "{" * 2000, "[" * 2000, "(a+)+$",
    ]) * source.choice([1, 1, 3])  # fmt: skip


def no_text(source: Random) -> Any:
    return source.choice([
        None, True, 0, -1, 1.5, float("nan"), 2**200, b"ba", bytearray(b"ba"), memoryview(b"ba"),
        {}, {"ba": 1}, {"ba"}, frozenset(["ba"]), object(), str, len, ..., NotImplemented, range(3),
        iter(["ba"]), (x for x in ["ba"]), deque(["ba"]), map(str, [1]), np.array(["ba", "ce"]),
        np.array("ba"), np.zeros((2, 2)), np.bytes_(b"ba"), np.float32(1), Exception("ba"),
    ])  # fmt: skip


def text_of_another_kind(source: Random) -> Any:
    return source.choice(
        [
            np.str_("ba ce"),
            Text("ba ce"),
            Text("ba " * 9000),
            ("ba", "ce"),
            ["ba", np.str_("ce")],
        ]
    )


def nested(source: Random) -> Any:
    """Lists that hold something other than texts, at a random place."""
    batch: list[Any] = tiny.prompts(source.randint(1, 200))
    wrong = source.choice(
        [None, 3, b"ba", ["ba"], ("ba",), [["ba"]], {}, [], object(), float("inf")]
    )
    batch[source.randrange(len(batch))] = wrong
    return source.choice([batch, tuple(batch), [batch]])


def deep(source: Random) -> Any:
    value: Any = "ba"
    for _ in range(source.choice([2, 50, 5_000])):
        value = [value]
    return value


def recursive(source: Random) -> Any:
    value: list[Any] = ["ba"]
    value.append(value)
    return value


def last_of_many(source: Random) -> Any:
    """Prompts that are all right, and one at the end that has too many tokens."""
    unit = source.choice([unit for unit in _UNITS if unit != "\ud800"])
    good = tiny.prompts(source.choice([1, 40, 400]))
    return [*good, unit * (source.choice([2_000, MOST_CHARS]) // len(unit))]


def many(source: Random) -> Any:
    """More prompts than there may be, or some hundreds of which one cannot be read."""
    if source.random() < 0.5:
        return ["ba"] * (10**6 + source.randint(1, 3))
    bad = source.choice([None, "\ud800", "x" * 30_000, "ba " * 5_000])
    return [*["ba"] * source.randint(0, 1_000), bad]


FAMILIES: tuple[Callable[[Random], Any], ...] = (
    blank, control, surrogates, invisible, combining, wide, anything, special, long, markup,
    no_text, text_of_another_kind, nested, deep, recursive, last_of_many, many,
)  # fmt: skip
