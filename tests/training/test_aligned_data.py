"""Runs on words whose targets are aligned to them: the tokenizer of the run folder."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import words
from tiny_training import tiny_config

from dlmone_fast.aligned_tokenizer import AlignedTokenizer
from dlmone_fast.config import Config
from dlmone_fast.errors import ConfigError
from dlmone_fast.training.workspace import open_workspace, with_vocabulary


def _config(folder: Path, **data: str) -> Config:
    return tiny_config(
        folder / "run",
        data_dir=str(words.write_splits(folder / "data")),
        data={"task": "g2p", "tokenizer": "aligned", "vocab_file": "", **data},
        distill={"selection_metric": "word_accuracy"},
    )


def test_letters_and_labels_are_learned_on_the_training_split(tmp_path: Path) -> None:
    config = _config(tmp_path)
    workspace = open_workspace(config)
    tokenizer = workspace.tokenizer
    assert isinstance(tokenizer, AlignedTokenizer)
    assert tokenizer.output_case == "upper"
    assert workspace.config.model.vocab_size == tokenizer.vocab_size
    again = open_workspace(config)
    assert again.tokenizer.hash == tokenizer.hash
    assert len(workspace.cache("valid")) == len(words.words()[::10])


def test_a_run_keeps_the_kind_of_its_tokenizer(tmp_path: Path) -> None:
    workspace = open_workspace(_config(tmp_path))
    other = tiny_config(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"data\.tokenizer is 'wordpiece', .* is 'aligned'"):
        with_vocabulary(other, workspace.tokenizer)


def test_what_cannot_be_aligned_is_said_where_it_is_first_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(tmp_path)
    with (tmp_path / "data" / "valid.jsonl").open("a") as file:
        file.write('{"src": "b", "trg": "b b b"}\n')
    workspace = open_workspace(config)
    with caplog.at_level(logging.WARNING):
        assert workspace.cache("valid").dropped == 1
        workspace.cache("valid")
    (said,) = caplog.messages
    assert "1 of 82 rows (1.22%) cannot be aligned" in said
