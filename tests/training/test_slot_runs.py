"""Whole runs whose sources are in slots: masked words, and letters aligned with their sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import words
from tiny_training import tiny_config

import dlmone_fast
from dlmone_fast.config import Config
from dlmone_fast.data.batches import BatchStream, lengths_for
from dlmone_fast.errors import ConfigError
from dlmone_fast.training import run
from dlmone_fast.training.pairs_phase import load_pairs

PAIRS = {"count": 20, "per_source": 2, "steps": 2, "batch_size": 8, "save_every": 1}


def aligned(folder: Path, **overrides: Any) -> Config:
    distill = {
        "selection_metric": "word_accuracy",
        "pairs": PAIRS,
        "stage1": {"anchor_steps": 2, "anchor_mse_weight": 0.0},
        **overrides.pop("distill", {}),
    }
    values: dict[str, Any] = {
        "data_dir": str(words.write_splits(folder / "data")),
        "model": {"source": "aligned", "seq_len": 20, "source_positions": 10, "max_positions": 10},
        "data": {"task": "g2p", "tokenizer": "aligned", "vocab_file": ""},
        "distill": distill,
        **overrides,
    }
    return tiny_config(folder / "run", **values)


def masked(folder: Path, **overrides: Any) -> Config:
    model = {"source": "masked", "seq_len": 28, "source_positions": 14}
    return tiny_config(folder / "run", model=model, **overrides)


@pytest.mark.parametrize("make", [aligned, masked])
def test_a_run_ends_with_a_student_whose_texts_do_not_depend_on_their_batch(
    make: Any, tmp_path: Path
) -> None:
    result = run(make(tmp_path))
    assert result.student is not None
    model = dlmone_fast.load(result.student, backend="eager")
    if make is aligned:
        prompts = [word for word in words.words() if "sh" in word][:20]
    else:
        prompts = [row.src for row in dlmone_fast_rows(result.workspace.data_dir)]
    together = model.generate(prompts, batch_size=7, seed=3)
    assert together == [model.generate(prompt, seed=3) for prompt in prompts]


def test_a_source_may_fill_all_of_its_positions(tmp_path: Path) -> None:
    assert aligned(tmp_path).max_source_tokens == 10 + 2
    assert masked(tmp_path).max_source_tokens == 14


def dlmone_fast_rows(folder: Path) -> Any:
    from dlmone_fast.data.rows import load_rows

    return load_rows(folder, "test", limit=20)


def test_a_batch_holds_words_of_similar_length(tmp_path: Path) -> None:
    from dlmone_fast.training.workspace import open_workspace

    workspace = open_workspace(aligned(tmp_path))
    cache = workspace.cache("train")
    lengths = lengths_for(cache, workspace.config.model)
    assert lengths is not None
    stream = BatchStream(cache, 5, 16, lengths=lengths)
    plain = BatchStream(cache, 5, 16)
    steps = range(3 * len(cache) // 16)
    spread = [np.ptp(lengths[stream.batch_rows(step)]) for step in steps]
    assert np.mean(spread) < 0.5 * np.mean([np.ptp(lengths[plain.batch_rows(s)]) for s in steps])
    # Every epoch holds each row once, wherever its batches begin.
    order = np.concatenate([stream.batch_rows(step) for step in steps])
    for epoch in range(2):
        rows = order[epoch * len(cache) : (epoch + 1) * len(cache)]
        assert sorted(rows) == list(range(len(cache)))
    again = BatchStream(cache, 5, 16, lengths=lengths)
    assert np.array_equal(again.batch_rows(7), stream.batch_rows(7))


def test_pairs_of_the_data_hold_the_training_targets(tmp_path: Path) -> None:
    pairs = {**PAIRS, "targets": "data"}
    distill = {"pairs": pairs, "stage1": {"anchor_steps": 1}, "temperature": 0.0}
    config = aligned(tmp_path, distill=distill)
    workspace = run(config, "teacher").workspace
    made = load_pairs(run(config, "pairs").workspace)[0]
    for row, ids in zip(made.rows.tolist(), made.ids.long(), strict=True):
        target = workspace.cache("train").pair(row)[1][1:-1]
        assert ids[: len(target)].tolist() == target
    student = run(config, "stage1").student
    assert student is not None
    model = dlmone_fast.load(student, backend="eager")
    assert model.settings.temperature == 0
    assert len(set(model.generate("shabate", num_candidates=4))) == 1


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("teacher", "embedding_noise", True),
        ("teacher", "mse_positions", "all"),
        ("teacher", "decoder_weight", 1.0),
        ("teacher", "condition_dropout", 0.1),
        ("distill", "embedding_noise", True),
    ],
)
def test_terms_over_every_position_are_refused(
    section: str, key: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.{key}.*needs model\.source = 'joined'"):
        masked(tmp_path, **{section: {key: value}})


def test_a_masked_teacher_learns_in_bf16_as_in_fp32(tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        config = masked(tmp_path / precision, precision=precision)
        result = run(config, "teacher")
        model = dlmone_fast.load_teacher(result.teacher or "")
        losses.append(torch.cat([p.flatten() for p in model.lm.backbone.parameters()]))
    torch.testing.assert_close(losses[0], losses[1], atol=5e-3, rtol=0.1)
