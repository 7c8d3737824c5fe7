"""What a card says of a task's data: its terms, and how far the test split was seen in training."""

from __future__ import annotations

import re
from pathlib import Path

from dlmone_fast.data.rows import load_rows

TERMS = {
    "qqp": """\
The model was trained on Quora's question pairs, whose terms allow non-commercial use only and no
redistribution of the data. The same terms bound these weights: **non-commercial use only**. The
licence of the code does not cover them."""
}
"""By the task's name in the configuration; other tasks' terms are the caller's to give."""


def overlap(data_dir: Path) -> str:
    """How many test pairs share texts with the training split, case and punctuation aside."""
    train = [(_plain(row.src), _plain(row.trg)) for row in load_rows(data_dir, "train")]
    test = [(_plain(row.src), _plain(row.trg)) for row in load_rows(data_dir, "test")]
    texts = {text for pair in train for text in pair}
    pairs = {frozenset(pair) for pair in train}
    same = sum(frozenset(pair) in pairs for pair in test)
    shared = sum(not texts.isdisjoint(pair) for pair in test)
    return (
        f"Of {len(test):,} test pairs {same:,} also occur in the training split, in either order; "
        f"{shared:,} share a text with it; in {len(test) - shared:,} both texts are unseen (case "
        "and punctuation aside)."
    )


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())
