"""A pronunciation model's release: measured, described, and loadable under its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import words
from tiny_training import tiny_config

import dlmone_fast
from dlmone_fast import packaged
from dlmone_fast.release.__main__ import ReleaseArgs, release_config
from dlmone_fast.release.g2p_folder import better_student, release
from dlmone_fast.training import RunResult, run


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("g2p")
    config = tiny_config(
        folder / "run",
        data_dir=str(words.write_splits(folder / "data")),
        model={"source": "aligned", "seq_len": 20, "source_positions": 10, "max_positions": 10},
        data={"task": "g2p", "tokenizer": "aligned", "vocab_file": ""},
        distill={"selection_metric": "word_accuracy"},
    )
    return run(config)


def test_a_release_answers_under_its_name(
    result: RunResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, table = release(result, "tiny", (), 30, lambda line: None)
    assert "student" in table
    assert "teacher, temperature 0.5" in table
    evaluation = json.loads((folder / "evaluation.json").read_text())
    rows = {(row["system"], row["calls"]): row for row in evaluation["rows"]}
    assert 0 <= rows["student", 1]["oracle_wer"] <= rows["student", 1]["wer"] <= 1
    assert "20 words, not chosen" not in (folder / "README.md").read_text()[:200]
    (tmp_path / "tiny").symlink_to(folder)
    monkeypatch.setattr(packaged, "ASSETS", tmp_path)
    (described,) = packaged.models()
    assert described.name == "tiny"
    assert described.scores["wer"] == pytest.approx(rows["student", 1]["wer"], abs=1e-4)
    model = dlmone_fast.load(folder)
    assert model.generate("shabe") == dlmone_fast.load("tiny").generate("shabe")


def test_the_temperature_is_the_highest_that_costs_little(result: RunResult) -> None:
    for stage, wers in (("stage1", {"0.0": 0.30, "1.0": 0.31}), ("stage2", {"0.0": 0.26})):
        file = result.root / f"temperature-{stage}.json"
        file.write_text(json.dumps({**wers, "0.5": 0.265, "0.7": 0.2699, "1.0": 0.31}))
    assert better_student(result, lambda line: None) == ("stage2", 0.7)


def test_the_schedule_is_the_preset_on_the_packaged_words() -> None:
    config = release_config(ReleaseArgs(schedule="g2p-en"))
    assert (config.preset, config.data.task, config.data_dir) == ("g2p", "g2p", "")
    assert packaged.DATA["g2p"].joinpath("train.jsonl.gz").is_file()
