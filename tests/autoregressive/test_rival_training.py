from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_autoregressive import SIZES, write_jsonl

from dlmone_fast.autoregressive import load_autoregressive, train
from dlmone_fast.autoregressive import training as training_module
from dlmone_fast.autoregressive.config import TrainingConfig
from dlmone_fast.autoregressive.folder import read_model
from dlmone_fast.autoregressive.training import Training
from dlmone_fast.errors import ConfigError, DivergedError, InterruptedAndSavedError
from dlmone_fast.models.checkpoint import list_checkpoints

Make = Callable[..., TrainingConfig]


def records(root: str) -> list[dict[str, float]]:
    lines = Path(root, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def newest(root: str) -> dict[str, torch.Tensor]:
    _, folder = list_checkpoints(Path(root, "checkpoints"))[-1]
    found = {}
    for name in ("model", "average", "best", "optimizer"):
        found |= {f"{name}:{k}": v for k, v in load_file(folder / f"{name}.safetensors").items()}
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_and_ends_with_a_model_that_answers(config: Make, precision: str):
    settings = config(rows=16 * 150, validate_every=50, precision=precision)
    folder = train(settings)
    scores = [line for line in records(settings.output_dir) if "wer" in line]
    assert [line["step"] for line in scores] == [50, 100, 150]
    assert scores[-1]["loss"] < 0.8 * scores[0]["loss"]
    assert scores[-1]["per"] < scores[0]["per"]
    stored = read_model(folder)
    assert stored.source["finished"] is True
    assert stored.source["best"]["value"] == min(line["wer"] for line in scores)
    answers = load_autoregressive(folder).generate(["abcd", "gg"])
    assert all(symbol in stored.vocabulary.symbols for text in answers for symbol in text.split())


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, how: Callable[[], None]) -> None:
    update = Training.update

    def stopping(self: Training) -> tuple[int, float, float]:
        done = update(self)
        if self.step == step:
            how()
        return done

    monkeypatch.setattr(Training, "update", stopping)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_training_continues_bit_for_bit(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
):
    whole = config(output_dir=str(tmp_path / "whole"), precision=precision)
    train(whole)
    parts = config(output_dir=str(tmp_path / "parts"), precision=precision)
    with monkeypatch.context() as patch:
        stop_at(7, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(InterruptedAndSavedError, match="SIGTERM after 7 of 12"):
            train(parts)
    train(parts)
    expected, found = newest(whole.output_dir), newest(parts.output_dir)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_max_minutes_saves_and_ends(config: Make):
    settings = config(max_minutes=1e-9)
    with pytest.raises(InterruptedAndSavedError, match="max-minutes"):
        train(settings)
    assert [step for step, _ in list_checkpoints(Path(settings.output_dir, "checkpoints"))] == [1]


def test_another_configuration_is_refused(config: Make):
    train(config())
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.003 there, 0\.001 now"):
        train(config(learning_rate=1e-3))
    with pytest.raises(ConfigError, match="model"):
        train(config(model=replace(SIZES, ffn=64)))


def test_other_data_are_refused(config: Make, data_dir: Path):
    train(config())
    with (data_dir / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"src": "abc", "trg": "aa bb cc"}\n')
    with pytest.raises(ConfigError, match="another train data"):
        train(config())


def test_where_and_how_often_it_saves_may_change(config: Make):
    first = train(config())
    assert train(config(save_minutes=3.0, log_every=7, max_minutes=100.0)) == first


def test_losses_that_are_not_finite_end_it(config: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        training_module,
        "smoothed_cross_entropy",
        lambda logits, wanted, smoothing: logits.sum() * float("nan"),
    )
    with pytest.raises(DivergedError, match="3 steps in a row"):
        train(config(max_bad_steps=3))


def test_what_cannot_be_used_is_counted(config: Make, data_dir: Path):
    rows = [{"src": "abc", "trg": "aa bb cc"}, {"src": "abcdefgh" * 3, "trg": "aa"}]
    write_jsonl(data_dir / "train.jsonl", rows)
    write_jsonl(data_dir / "valid.jsonl", [*rows, {"src": "xyz", "trg": "aa"}])
    prepared = training_module.prepare(config())
    assert (prepared.dropped.unknown, prepared.dropped.long) == (0, 1)
    assert len(prepared.train) == 1
    assert prepared.dropped_valid.unknown == 1
    assert prepared.dropped_valid.long == 1


def test_text_is_scored_by_bleu(config: Make, text_dir: Path):
    settings = config(
        data_dir=str(text_dir), tokens="wordpiece", vocab_size=100, both_directions=True,
        model=replace(SIZES, source_positions=40, target_positions=40),
    )  # fmt: skip
    folder = train(settings)
    last = [line for line in records(settings.output_dir) if "bleu" in line][-1]
    assert {"source_bleu", "exact_copy", "repeat", "ibleu", "loss"} <= last.keys()
    assert read_model(folder).vocabulary.kind == "wordpiece"
    assert len(training_module.prepare(settings).train) == 120
