"""The room of a source among a sequence's positions; `data/layouts.py` lays sequences out."""

from __future__ import annotations

# [SEP] of the source, the second [SEP] and [SEP] of the target are always kept.
SEPARATORS = 3


def largest_source(seq_len: int, source_positions: int = 0, source: str = "joined") -> int:
    """The most tokens of a source, [CLS] and [SEP] included, that a target can follow."""
    if source == "aligned":
        # Only the symbols between the two take positions.
        return source_positions + 2
    if source == "masked":
        return source_positions
    return source_positions - 1 if source_positions else seq_len - SEPARATORS


def default_source_limit(seq_len: int, source_positions: int = 0, source: str = "joined") -> int:
    """Half of the sequence, or what the source's own positions hold."""
    largest = largest_source(seq_len, source_positions, source)
    return largest if source_positions else min(seq_len // 2, largest)
