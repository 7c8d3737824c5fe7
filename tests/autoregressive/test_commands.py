from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dlmone_fast import distil_targets, start, train_autoregressive
from dlmone_fast.autoregressive import distillation, training
from dlmone_fast.errors import ConfigError, UsageError


@pytest.mark.parametrize("command", ["train_autoregressive", "distil_targets", "start"])
def test_help_answers_without_torch(command: str):
    code = (
        f"import sys, dlmone_fast.{command} as c\n"
        "try:\n    c.main(['--help'])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python -m dlmone_fast.{command}" in done.stdout


def test_flags_of_a_training_become_its_configuration(monkeypatch: pytest.MonkeyPatch):
    given: list[Any] = []
    monkeypatch.setattr(training, "train", lambda config, started: given.append(config))
    train_autoregressive.main(
        [
            "--data-dir",
            "D",
            "--output-dir",
            "R",
            "--tokens",
            "wordpiece",
            "--both-directions",
            "--start-from",
            "S",
            "--model.dropout",
            "0.2",
            "--rows",
            "64",
        ]
    )
    (config,) = given
    assert (config.data_dir, config.output_dir, config.start_from) == ("D", "R", "S")
    assert config.both_directions is True
    assert (config.model.dropout, config.rows) == (0.2, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.heads", "3"], r"model\.heads must divide width"),
        (["--both-directions"], "both_directions belongs to tokens = 'wordpiece'"),
        (["--selection", "bleu"], "not measured with tokens = 'symbols'"),
        (["--tokens", "wordpiece", "--vocab-file", "v", "--start-from", "s"], "exclude each other"),
        (["--learning-rate", "2"], "learning_rate must be between 0 and 1"),
        ([], "--data-dir is missing"),
    ],
)
def test_a_training_that_cannot_be_is_refused(arguments: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        train_autoregressive.main(arguments)


def test_models_and_exclusions_may_be_named_several_times(monkeypatch: pytest.MonkeyPatch):
    given: list[Any] = []
    monkeypatch.setattr(distillation, "distil", lambda config, say: given.append(config))
    distil_targets.main(
        [
            "--data-dir",
            "D",
            "--output-dir",
            "N",
            "--model",
            "a",
            "--model",
            "b",
            "--exclude",
            "test",
            "--exclude",
            "f.txt",
        ]
    )
    (config,) = given
    assert config.model == ("a", "b")
    assert config.exclude == ("test", "f.txt")
    with pytest.raises(ConfigError, match="--data-dir is missing"):
        distil_targets.main(["--model", "a"])


def test_an_unknown_start_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match="minilm-l6"):
        start.main(["bert", str(tmp_path / "out")])
