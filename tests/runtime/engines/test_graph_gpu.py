"""The graph engine on a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

from dlmone_fast.kernels.nearest_token import Vocabulary
from dlmone_fast.runtime.engines import make_engine, why_unavailable
from dlmone_fast.runtime.engines.choose import EngineRequest
from dlmone_fast.runtime.engines.graph import GraphEngine, GraphRunner
from dlmone_fast.runtime.pipeline import Pipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def frozen():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=["pre", "post"])
def request_of_model(request: pytest.FixtureRequest) -> EngineRequest:
    model = EngineRequest(tiny.denoiser(norm=request.param).to("cuda"), "fp32")
    reason = why_unavailable("graph", model)
    if reason:
        pytest.skip(reason)
    return model


def graph_runner(request: EngineRequest, precision: str = "fp32") -> GraphRunner:
    engine = make_engine("graph", EngineRequest(request.denoiser, precision))
    assert isinstance(engine, GraphEngine)
    return engine.runner()


def pipeline_of(request: EngineRequest, steps: int = 1) -> Pipeline:
    denoiser = request.denoiser
    return Pipeline(denoiser.schedule, Vocabulary(denoiser.embedding), 30, steps, False)


@pytest.mark.parametrize("steps", [1, 4])
def test_fp32_ids_are_those_of_the_eager_engine(request_of_model: EngineRequest, steps: int):
    pipeline = pipeline_of(request_of_model, steps)
    eager = make_engine("eager", request_of_model).runner()
    runner = graph_runner(request_of_model)
    for rows in (1, 3, 64, 100, 600):
        batch = tiny.row_batch(rows, steps, seed=rows)
        found, expected = runner.ids(pipeline, batch)[0], eager.ids(pipeline, batch)[0]
        # A product may round otherwise in another bucket, which a near tie may show.
        assert (found == expected).float().mean() >= 0.999


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_choose_nearly_the_same_tokens(
    request_of_model: EngineRequest, precision: str
):
    pipeline, batch = pipeline_of(request_of_model), tiny.row_batch(64)
    exact = make_engine("eager", request_of_model).runner().ids(pipeline, batch)[0]
    found = graph_runner(request_of_model, precision).ids(pipeline, batch)[0]
    assert (found == exact).float().mean() > 0.97


def test_replays_are_equal(request_of_model: EngineRequest):
    runner, pipeline = graph_runner(request_of_model, "bf16"), pipeline_of(request_of_model)
    batch, other = tiny.row_batch(7), tiny.row_batch(8, seed=1)
    first = runner.ids(pipeline, batch)[0]
    for _ in range(100):
        assert torch.equal(runner.ids(pipeline, batch)[0], first)
        runner.ids(pipeline, other)


def test_single_predictions(request_of_model: EngineRequest):
    runner = graph_runner(request_of_model)
    for rows in (1, 3, 3):
        x_t, t = torch.randn(rows, 20, 16, device="cuda"), torch.randint(0, 40, (rows,)).cuda()
        expected = request_of_model.denoiser(x_t, t)
        torch.testing.assert_close(runner.predict(x_t, t), expected, rtol=1e-4, atol=1e-4)


def test_threads_with_runners_of_their_own(request_of_model: EngineRequest):
    engine = make_engine("graph", request_of_model)
    pipeline = pipeline_of(request_of_model)
    batches = [tiny.row_batch(1 + i % 9, seed=i) for i in range(32)]
    alone = engine.runner()
    expected = [alone.ids(pipeline, batch)[0] for batch in batches]

    def generate(first: int) -> list[torch.Tensor]:
        # Each records its graphs while the others replay theirs.
        runner = engine.runner()
        return [runner.ids(pipeline, batch)[0] for batch in batches[first::4]]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(generate, range(4)))
    for first in range(4):
        for ids, batch_ids in zip(found[first], expected[first::4], strict=True):
            assert torch.equal(ids, batch_ids)


def test_closing_gives_the_memory_back(request_of_model: EngineRequest):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    engine = make_engine("graph", request_of_model)
    engine.runner().ids(pipeline_of(request_of_model), tiny.row_batch(256))
    assert torch.cuda.memory_reserved() > before
    engine.close()
    del engine
    torch.cuda.empty_cache()
    # What cuBLAS and torch keep for a stream stays.
    assert torch.cuda.memory_reserved() <= before + (64 << 20)
