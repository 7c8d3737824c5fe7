"""A few hundred words of a made-up spelling, and how they sound: data for aligned tokenizers.

Each letter has its own sound, but for `e` at the end (silent), `x` (two sounds) and `sh` (one).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path

_SOUNDS = {"a": "ah", "i": "ih", "o": "ow", "b": "b", "t": "t", "s": "s", "m": "m"}
_STARTS = ("b", "t", "s", "m", "sh", "x")
_ENDS = ("", "e", "t", "x", "me")


def sounds(word: str) -> str:
    """Symbols of a word, separated by spaces."""
    spoken, rest = [], word
    while rest:
        if rest.startswith("sh"):
            spoken.append("sh")
            rest = rest[2:]
            continue
        if rest[0] == "x":
            spoken += ["k", "s"]
        elif rest != "e":
            spoken.append(_SOUNDS[rest[0]])
        rest = rest[1:]
    return " ".join(spoken)


def words() -> list[str]:
    """All words, in a fixed order."""
    vowels = "aio"
    return [
        f"{start}{first}{middle}{second}{end}"
        for start, first, middle, second, end in product(_STARTS, vowels, "btm", vowels, _ENDS)
    ]


def pairs() -> list[tuple[str, str]]:
    """Words with their sounds."""
    return [(word, sounds(word)) for word in words()]


def write_split(path: Path, rows: Iterable[tuple[str, str]]) -> Path:
    """Write rows in the data folder's format."""
    lines = (json.dumps({"src": source, "trg": target}) + "\n" for source, target in rows)
    path.write_text("".join(lines))
    return path


def write_splits(folder: Path) -> Path:
    """Write train, valid and test splits of all words; no word is in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    every = pairs()
    write_split(folder / "train.jsonl", [pair for i, pair in enumerate(every) if i % 10 > 1])
    write_split(folder / "valid.jsonl", every[::10])
    write_split(folder / "test.jsonl", every[1::10])
    return folder
