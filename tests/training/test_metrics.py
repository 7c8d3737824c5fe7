"""metrics.jsonl of a finished run: every diagnostic of the method is there, and is a number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from dlmone_fast.config import from_dict, load_toml
from dlmone_fast.training import RunResult

Records = list[dict[str, Any]]

OF_TEXT = (
    "bleu",
    "ibleu",
    "rouge_l",
    "empty",
    "length_ratio",
    "repeat",
    "self_bleu",
    "div_4",
    "exact_copy",
    "unknown",
)
OF_UPDATES = (
    "score_matching",
    "discriminator",
    "sid",
    "adversarial",
    "score_gradient_norm",
    "generator_gradient_norm",
    "weight_max_over_median",
    "sid_gradient_at_x",
    "adversarial_gradient_at_x",
    "fake_net_lag",
    "samples_per_second",
)


def values_of(records: Records, phase: str, key: str) -> Iterator[Any]:
    return (record[key] for record in records if record["phase"] == phase and key in record)


@pytest.mark.parametrize("phase", ["stage1", "stage2"])
@pytest.mark.parametrize("key", OF_UPDATES)
def test_a_stage_records_its_update_diagnostics(records: Records, phase: str, key: str) -> None:
    values = list(values_of(records, phase, key))
    assert values
    assert all(math.isfinite(value) for value in values)
    if key != "sid":
        assert all(value >= 0 for value in values)
    if key == "weight_max_over_median":
        assert all(value >= 1 for value in values)


@pytest.mark.parametrize("phase", ["stage1", "stage2"])
@pytest.mark.parametrize("which", ["raw", "ema"])
@pytest.mark.parametrize("key", OF_TEXT)
def test_a_stage_records_the_scores_of_its_texts(
    records: Records, phase: str, which: str, key: str
) -> None:
    values = list(values_of(records, phase, f"{which}_{key}"))
    # Step 0 has no average of its own; then steps 3 and the last.
    assert len(values) == (3 if which == "raw" else 2)
    assert all(math.isfinite(value) for value in values)


@pytest.mark.parametrize("phase", ["stage1", "stage2"])
def test_a_stage_records_discriminator_accuracy_by_timestep(records: Records, phase: str) -> None:
    found = [list(values_of(records, phase, f"accuracy_t{i}")) for i in range(4)]
    assert all(0 <= share <= 1 for shares in found for share in shares)
    assert all(found)


def test_the_teacher_records_its_losses(records: Records) -> None:
    for key in ("loss", "mse", "nll", "gradient_norm", "learning_rate"):
        assert len(list(values_of(records, "teacher", key))) == 7
    for key in ("valid_loss", "valid_mse", "valid_nll"):
        assert len(list(values_of(records, "teacher", key))) == 2
    rates = list(values_of(records, "teacher", "learning_rate"))
    assert rates[0] == pytest.approx(1e-3)
    assert rates[1] == max(rates) == pytest.approx(2e-3)


@pytest.mark.parametrize("phase", ["teacher", "stage1", "stage2"])
def test_sample_texts_are_recorded(records: Records, phase: str) -> None:
    for samples in values_of(records, phase, "samples"):
        assert len(samples) == 3
        assert all(isinstance(text, str) for pair in samples for text in pair)


def test_slow_diagnostics_are_measured_only_when_due(records: Records) -> None:
    # θ updates 0 and 2 of 4, after two updates of ψ alone.
    lags = [r["step"] for r in records if r["phase"] == "stage1" and "fake_net_lag" in r]
    assert lags == [3, 5]
    theta = [r["step"] for r in records if r["phase"] == "stage1" and "sid" in r]
    assert theta == [3, 4, 5, 6]


def test_the_adversarial_term_waits_for_its_warm_up(records: Records) -> None:
    adversarial = list(values_of(records, "stage1", "adversarial"))
    assert adversarial[0] == 0
    assert all(value > 0 for value in adversarial[1:])


def test_the_resolved_configuration_is_written_beside_the_run(finished: RunResult) -> None:
    config = from_dict(load_toml(finished.root / "config.toml"))
    assert config == finished.workspace.config
    assert config.model.vocab_size == finished.workspace.tokenizer.vocab_size > 0


def test_model_folders_and_checkpoints_lie_where_they_are_documented(finished: RunResult) -> None:
    for phase, last in (("teacher", 7), ("stage1", 6), ("stage2", 5)):
        assert (finished.root / phase / "manifest.json").exists()
        folders = sorted(p.name for p in (finished.root / "checkpoints" / phase).iterdir())
        assert len(folders) == 2
        assert folders[-1] == f"step-{last:08d}"
    assert finished.teacher == finished.root / "teacher"
    assert finished.student == finished.root / "stage2"
