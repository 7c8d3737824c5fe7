"""The cuts of a run's data, counted before it begins, while it goes, and for its last table."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dlmone_fast.config import Config
from dlmone_fast.data.check import check_splits
from dlmone_fast.data.cuts import Cut, cuts_of, lengths_of_cache, lengths_of_file
from dlmone_fast.data.rows import SPLITS, find_split
from dlmone_fast.models.pretrained import read_pretrained
from dlmone_fast.tasks import grammar
from dlmone_fast.text_tokenizer import TextTokenizer
from dlmone_fast.training.start import with_start
from dlmone_fast.training.workspace import Workspace, make_tokenizer, with_vocabulary

# Generated rows are all alike: as many show their lengths.
_GENERATED_ROWS = 1000


def cuts_of_run(workspace: Workspace) -> list[Cut]:
    """The cuts of every split that a run has."""
    return [
        cut
        for split in SPLITS
        if _is_there(workspace.data_dir, split)
        for cut in cuts_of(lengths_of_cache(split, workspace.cache(split)), workspace.config)
    ]


def planned_cuts(
    config: Config, tokenizer: TextTokenizer | None = None
) -> tuple[Config, list[str]]:
    """The cuts of a run to come, from its data: sentences, and the configuration with the size of
    the vocabulary. Nothing is written.

    Args:
        tokenizer: a given teacher's; None: made as the run will make it.

    Raises:
        DataError: the data are missing or malformed.
        ConfigError: the vocabulary has another size than the configuration says.
    """
    if config.is_grammar:
        with tempfile.TemporaryDirectory() as folder:
            rows = min(config.data.train_rows, _GENERATED_ROWS)
            grammar.write_splits(folder, config.data.task, config.seed, rows, rows, rows)
            return _planned(config, Path(folder), tokenizer)
    if not config.data_dir:
        return config, ["cuts         are counted where --data-dir names the data"]
    check_splits(config.data_dir, config.data.max_chars, ("train", "valid"))
    return _planned(config, Path(config.data_dir), tokenizer)


def _planned(
    config: Config, data_dir: Path, tokenizer: TextTokenizer | None
) -> tuple[Config, list[str]]:
    if tokenizer is None:
        start = read_pretrained(config.model.start_from) if config.model.start_from else None
        config = config if start is None else with_start(config, start)
        tokenizer = make_tokenizer(config, data_dir, start)
    tokenizer.max_chars = config.data.max_chars
    config = with_vocabulary(config, tokenizer)
    lines = []
    for split in SPLITS:
        if _is_there(data_dir, split):
            both = split == "train" and config.data.both_directions
            lengths = lengths_of_file(split, find_split(data_dir, split), tokenizer, both)
            lines += [cut.sentence() for cut in cuts_of(lengths, config)]
    heads = ["cuts", *[""] * len(lines)]
    return config, [f"{head:<12} {line}" for head, line in zip(heads, lines, strict=False)]


def _is_there(data_dir: Path, split: str) -> bool:
    return any(os.path.isfile(data_dir / f"{split}{end}") for end in (".jsonl", ".jsonl.gz"))
