"""Damage to files, of six kinds, at places that a seed chooses."""

from __future__ import annotations

import os
import random
from pathlib import Path

DAMAGES = ("flip", "truncate", "delete", "append", "zero", "swap")


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def _append(path: Path, rng: random.Random) -> None:
    with path.open("ab") as stream:
        stream.write(rng.choice([b"\0", b"\n", b" ", rng.randbytes(64)]))


def _zero(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + 256)
    if not any(content[start:end]):
        start, end = 0, len(content)
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def _swap(path: Path, rng: random.Random) -> None:
    """Exchange two different parts of the file, of equal lengths and at random places."""
    content = bytearray(path.read_bytes())
    before, half = bytes(content), len(content) // 2
    for _ in range(100):
        size = rng.randint(1, max(1, min(half, 1000)))
        first = rng.randint(0, len(content) - 2 * size)
        second = rng.randint(first + size, len(content) - size)
        a, b = before[first : first + size], before[second : second + size]
        if a != b:
            content[first : first + size], content[second : second + size] = b, a
            break
    path.write_bytes(content)


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Damage one file; its content is different afterwards."""
    before = path.read_bytes()
    {
        "flip": _flip,
        "truncate": _truncate,
        "delete": _delete,
        "append": _append,
        "zero": _zero,
        "swap": _swap,
    }[kind](path, rng)
    assert not path.exists() or path.read_bytes() != before
