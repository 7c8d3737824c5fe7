"""Tiny pronunciations and sizes, for tests of autoregressive models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlmone_fast.autoregressive.config import ModelConfig

SIZES = ModelConfig(
    width=32, heads=2, encoder_layers=1, decoder_layers=1, ffn=32, dropout=0.1,
    source_positions=12, target_positions=12,
)  # fmt: skip
LETTERS = "abcdefgh"


def spelled(word: str) -> str:
    """The 'pronunciation' of a word: a symbol a letter, doubled letters said once."""
    kept = [a for a, b in zip(word, f" {word}", strict=False) if a != b]
    return " ".join(letter * 2 for letter in kept)


def words(count: int, first: int = 0) -> list[str]:
    """Words of two to six letters, no two alike."""
    made = []
    for index in range(first, first + count):
        rest, word = index * 7919 + 11, ""
        for _ in range(2 + index % 5):
            word += LETTERS[rest % 8]
            rest = rest // 8 + index
        made.append(word)
    return made


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
