"""Tiny data and trainings for the autoregressive package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_autoregressive import SIZES, spelled, words, write_jsonl

from dlmone_fast.autoregressive.config import TrainingConfig


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Pronunciations; validation and test rows have further references."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count, first in (("train", 200, 0), ("valid", 20, 300), ("test", 20, 400)):
        rows: list[dict[str, Any]] = [
            {"src": word, "trg": spelled(word)} for word in words(count, first)
        ]
        if split != "train":
            rows = [row | {"refs": [row["trg"], "aa"]} for row in rows]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def text_dir(tmp_path: Path) -> Path:
    """Questions and what asks the same."""
    folder = tmp_path / "text"
    folder.mkdir()
    nouns = ("cat", "dog", "old tree", "river", "engine", "summer")
    for split, count in (("train", 60), ("valid", 8), ("test", 8)):
        rows = [
            {
                "src": f"how does the {nouns[i % 6]} work {i % 9}?",
                "trg": f"what makes the {nouns[i % 6]} go {i % 9}?",
            }
            for i in range(count)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def config(data_dir: Path, tmp_path: Path) -> Callable[..., TrainingConfig]:
    """A training of seconds; keyword arguments change it."""

    def make(**changes: Any) -> TrainingConfig:
        base = TrainingConfig(
            data_dir=str(data_dir), output_dir=str(tmp_path / "run"), rows=16 * 12, batch_size=16,
            warmup_steps=4, learning_rate=3e-3, validate_every=5, precision="fp32", model=SIZES,
            log_every=2,
        )  # fmt: skip
        return replace(base, **changes)

    return make
