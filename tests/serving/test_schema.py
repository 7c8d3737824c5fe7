"""Bounds of a request that depend on the model, and those of its temperature."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from dlmone_fast.runtime.options import GenerationSettings
from dlmone_fast.serving.body import printable
from dlmone_fast.serving.options import ServeOptions
from dlmone_fast.serving.schema import reason, request_model
from dlmone_fast.serving.workers import Workers


def refusal(workers: Workers, **fields: Any) -> str:
    """What is said of a request; "": it is accepted."""
    model = request_model(ServeOptions("model", max_rows=100), lambda: workers.own_steps)
    try:
        model.model_validate({"prompts": ["ba"], **fields})
    except ValidationError as error:
        # As FastAPI gives them.
        return reason([{**one, "loc": ("body", *one["loc"])} for one in error.errors()])
    return ""


def test_rows_are_bounded_with_the_model_s_own_steps():
    workers = Workers()
    assert refusal(workers, prompts=["ba"] * 6) == ""
    # A worker has loaded a teacher.
    workers.loaded(20)
    assert refusal(workers, prompts=["ba"] * 5) == ""
    assert refusal(workers, prompts=["ba"] * 6, steps=2) == ""
    said = refusal(workers, prompts=["ba"] * 3, num_candidates=2)
    assert said.startswith(
        "prompts × num_candidates × steps is 120 (with the model's own 20 steps), expected at "
        "most 100, the server's --max-rows; correct the request"
    )
    assert "is 101, expected" in refusal(workers, steps=101)


def test_a_name_that_is_no_unicode_and_a_value_nested_deeply_can_be_told():
    said = refusal(Workers(), **{"x" * 100: 1})
    assert said.startswith("x" * 80 + "…: Extra inputs")
    assert printable("\ud800") == "\\ud800"
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    assert "a value that is nested too deeply" in refusal(Workers(), seed=deep)


@pytest.mark.parametrize("value", [None, 0, 0.5, 10])
def test_a_temperature_within_the_model_s_bounds(value: Any):
    assert refusal(Workers(), temperature=value) == ""
    if value is not None:
        assert GenerationSettings(temperature=value).temperature == value


@pytest.mark.parametrize(
    "value", [-0.1, 10.1, float("nan"), float("inf"), "1", True, [1.0]], ids=json.dumps
)
def test_a_temperature_beyond_them_is_named(value: Any):
    assert refusal(Workers(), temperature=value).startswith("temperature: Input should be")
