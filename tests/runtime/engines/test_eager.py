"""The eager engine, and the whole path from ids to ids on it."""

from __future__ import annotations

import pytest
import tiny
import torch

from dlmone_fast.errors import BackendUnavailableError, UsageError
from dlmone_fast.kernels.nearest_token import Vocabulary
from dlmone_fast.runtime.engines import make_engine
from dlmone_fast.runtime.engines.choose import EngineRequest
from dlmone_fast.runtime.pipeline import Pipeline
from dlmone_fast.runtime.rows import RowBatch, Rows


@pytest.fixture(autouse=True)
def frozen():
    with torch.inference_mode():
        yield


def batch_of(rows: int, steps: int = 1) -> RowBatch:
    numbers = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, 60, (rows, tiny.SEQ_LEN), generator=numbers)
    sources = torch.arange(tiny.SEQ_LEN) < torch.arange(3, 3 + rows).remainder(9)[:, None]
    return Rows(ids, (~sources).long(), range(rows), [0] * rows).batch(steps)


@pytest.mark.parametrize("steps", [1, 3])
def test_ids_are_those_of_the_denoiser(steps: int):
    denoiser = tiny.denoiser()
    runner = make_engine("eager", EngineRequest(denoiser, "fp32")).runner()
    pipeline = Pipeline(denoiser.schedule, Vocabulary(denoiser.embedding), 30, steps, False)
    batch = batch_of(12, steps)
    found, margins = runner.ids(pipeline, batch)
    expected, _ = pipeline.run(denoiser, batch)
    assert torch.equal(found, expected)
    assert (margins >= 0).all()
    sources = batch.mask == 0
    assert torch.equal(found[sources], batch.ids[sources])


def test_sixteen_bits_choose_nearly_the_same_tokens():
    denoiser = tiny.denoiser()
    pipeline = Pipeline(denoiser.schedule, Vocabulary(denoiser.embedding), 30, 1, False)
    batch = batch_of(64)
    expected, _ = pipeline.run(denoiser, batch)
    for precision in ("bf16", "fp16"):
        runner = make_engine("eager", EngineRequest(denoiser, precision)).runner()
        found, _ = runner.ids(pipeline, batch)
        assert (found == expected).float().mean() > 0.98


def test_what_cannot_run_is_refused_with_what_can():
    request = EngineRequest(tiny.denoiser(), "fp32")
    with pytest.raises(UsageError, match="backend must be one of"):
        make_engine("fast", request)
    with pytest.raises(BackendUnavailableError, match="it has no int8"):
        make_engine("eager", EngineRequest(request.denoiser, "int8"))
    with pytest.raises(BackendUnavailableError, match="cannot run: there is no CUDA"):
        make_engine("graph", request)
