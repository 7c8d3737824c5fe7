"""Numbers of numpy and torch are numbers, and booleans are none, wherever an argument is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dlmone_fast.checks import as_real, as_whole
from dlmone_fast.config import resolve, to_toml
from dlmone_fast.data.batches import BatchStream, batches_in_order
from dlmone_fast.data.layouts import check_seq_len, source_limit
from dlmone_fast.errors import ConfigError, UsageError
from dlmone_fast.evaluation.bootstrap import check_resamples
from dlmone_fast.kernels.noise import permutation, random_bits
from dlmone_fast.runtime.options import GenerationSettings, real_number, whole_number
from dlmone_fast.samplers.grids import timestep_grid
from dlmone_fast.samplers.loop import SamplerOptions
from dlmone_fast.samplers.one_step import renoising_times
from dlmone_fast.serving.options import ServeOptions
from dlmone_fast.tasks.grammar import write_splits
from dlmone_fast.tokenizer import SPECIAL_TOKENS, Tokenizer

TRUE = [True, np.True_, torch.tensor(True)]


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_any_library(value: Any) -> None:
    assert type(as_whole(value)) is int
    assert as_whole(value) == 3
    assert whole_number("steps", value, 1, 5) == 3


@pytest.mark.parametrize("value", [*TRUE, 3.0, np.float64(3), "3", None, b"3", [3]])
def test_what_is_no_whole_number(value: Any) -> None:
    assert as_whole(value) is None
    with pytest.raises(UsageError, match="steps must be a whole number from 1 to 5"):
        whole_number("steps", value, 1, 5)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5)])
def test_real_numbers_of_any_library(value: Any) -> None:
    assert type(real_number("eta", value, 0, 1)) is float
    assert as_real(value) == 0.5


@pytest.mark.parametrize("value", [*TRUE, "0.5", None, float("nan"), np.float32("nan"), 10**400])
def test_what_is_no_real_number_within_bounds(value: Any) -> None:
    with pytest.raises(UsageError, match="eta must be a number from 0 to 1"):
        real_number("eta", value, 0, 1)


def test_settings_take_numpy_s_numbers_and_keep_python_s() -> None:
    settings = GenerationSettings(
        steps=np.int64(2), eta=np.float32(0), temperature=np.float32(0.5), t_init=np.int32(7)
    )
    numbers = settings.steps, settings.eta, settings.temperature, settings.t_init
    assert list(map(type, numbers)) == [int, float, float, int]
    assert settings.with_call(None, None, None, np.float32(0.25)).temperature == 0.25


def test_a_configuration_takes_numpy_s_numbers_and_keeps_python_s() -> None:
    config = resolve(seed=np.int64(3), teacher={"learning_rate": np.float32(0.5)})
    assert type(config.seed) is int
    assert type(config.teacher.learning_rate) is float
    assert "learning_rate = 0.5" in to_toml(config)
    with pytest.raises(ConfigError, match="seed must be a whole number, got True"):
        resolve(seed=True)
    with pytest.raises(ConfigError, match=r"learning_rate must be a number, got True"):
        resolve(teacher={"learning_rate": True})


@pytest.mark.parametrize(
    "call",
    [
        lambda true: GenerationSettings(temperature=true),
        lambda true: GenerationSettings(kind="teacher", sampler="ddim", eta=true),
        lambda true: GenerationSettings(steps=true),
        lambda true: SamplerOptions(eta=true),
        lambda true: timestep_grid("ddim", true, 100),
        lambda true: renoising_times(100, true),
        lambda true: Tokenizer(SPECIAL_TOKENS, max_chars=true),
        lambda true: Tokenizer(SPECIAL_TOKENS).decode([true]),
        lambda true: check_seq_len(16, true),
        lambda true: source_limit(16, true),
        lambda true: BatchStream([1], 0, true),
        lambda true: BatchStream([1], 0, 1).batch_rows(true),
        lambda true: list(batches_in_order(1, true)),
        lambda true: check_resamples(true),
        lambda true: random_bits(true, 0, 0, 0, 0),
        lambda true: random_bits(0, 0, true, 0, 0),
        lambda true: permutation(0, 0, 0, true),
        lambda true: ServeOptions("model", port=true).check(),
        lambda true: write_splits("nowhere", "grammar", 0, true, 1, 1),
    ],
)
@pytest.mark.parametrize("true", TRUE[:2])
def test_true_is_no_number_of_any_argument(call: Callable[[Any], object], true: Any) -> None:
    with pytest.raises(UsageError):
        call(true)
