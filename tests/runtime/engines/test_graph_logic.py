"""All of the graph engine but the recording itself, which here runs its work again instead."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

from dlmone_fast.errors import ForkedProcessError, ModelNotLoadedError, UsageError
from dlmone_fast.kernels.nearest_token import Vocabulary
from dlmone_fast.runtime.engines import graph
from dlmone_fast.runtime.engines.capture import CAPTURING, is_out_of_memory
from dlmone_fast.runtime.pipeline import Pipeline
from dlmone_fast.runtime.rows import RowBatch


class HostCall:
    """Captures by keeping the work, replays by running it on the same static tensors."""

    def __init__(self, lane: HostLane) -> None:
        self.lane = lane
        self.work: Callable[[], None] | None = None

    def capture(self, work: Callable[[], None]) -> None:
        assert CAPTURING.locked(), "captures come one after the other"
        if self.lane.fits is not None and not self.lane.fits():
            raise torch.cuda.OutOfMemoryError("no memory")
        work()
        self.work = work
        self.lane.calls.append(self)

    def replay(self) -> None:
        assert self.work is not None
        assert self.lane.inside == threading.get_ident()
        self.work()

    def drop(self) -> None:
        self.work = None


class HostLane:
    """A lane on the CPU."""

    fits: Callable[[], bool] | None = None

    def __init__(self, device: torch.device) -> None:
        self.calls: list[HostCall] = []
        self.inside: int | None = None
        self.released = 0

    def call(self) -> HostCall:
        return HostCall(self)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        assert self.inside is None, "two threads in one lane"
        self.inside = threading.get_ident()
        yield
        self.inside = None

    def between_callers_work(self, *results: torch.Tensor) -> contextlib.AbstractContextManager:
        return self.entered()

    def wait(self) -> None:
        pass

    def host_memory(self, count: int) -> torch.Tensor:
        return torch.full((count,), -7)

    def reserved_bytes(self) -> int:
        return 0

    def release(self) -> None:
        self.released += 1


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph, "Lane", HostLane)
    monkeypatch.setattr(HostLane, "fits", None)


DENOISER = tiny.denoiser()


def pipeline_of(steps: int = 1) -> Pipeline:
    return Pipeline(DENOISER.schedule, Vocabulary(DENOISER.embedding), 30, steps, False)


def expected(pipeline: Pipeline, batch: RowBatch) -> torch.Tensor:
    with torch.inference_mode():
        return pipeline.run(DENOISER, batch)[0]


@pytest.fixture
def engine() -> graph.GraphEngine:
    return graph.GraphEngine(DENOISER, "fp32")


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13])
def test_padding_never_changes_a_result(engine: graph.GraphEngine, rows: int, steps: int):
    pipeline, batch = pipeline_of(steps), tiny.row_batch(rows, steps)
    found, margins = engine.runner().ids(pipeline, batch)
    assert torch.equal(found, expected(pipeline, batch))
    assert found.shape == (rows, tiny.SEQ_LEN)
    assert margins.tolist() == [float("inf")] * rows


def test_static_memory_is_filled_anew_and_results_leave_as_copies(engine: graph.GraphEngine):
    runner, pipeline = engine.runner(), pipeline_of()
    batches = [tiny.row_batch(rows, seed=rows) for rows in (4, 3, 4, 3)]
    # Same bucket: what the larger batch left behind must not show in the smaller one.
    found = [runner.ids(pipeline, batch)[0] for batch in batches]
    for ids, batch in zip(found, batches, strict=True):
        assert torch.equal(ids, expected(pipeline, batch))
    assert len({ids.untyped_storage().data_ptr() for ids in found}) == 4
    assert len(runner._lane.calls) == 1


def test_pipelines_buckets_and_lengths_have_recordings_of_their_own(engine: graph.GraphEngine):
    runner, one, four = engine.runner(), pipeline_of(1), pipeline_of(4)
    for pipeline, steps in ((one, 1), (four, 4)):
        for rows in (2, 3, 4):
            batch = tiny.row_batch(rows, steps)
            assert torch.equal(runner.ids(pipeline, batch)[0], expected(pipeline, batch))
    assert len(runner._lane.calls) == 4
    short = tiny.row_batch(4)
    short = RowBatch(short.ids[:, :11], short.mask[:, :11], short.draws)
    assert torch.equal(runner.ids(one, short)[0], expected(one, short))
    assert len(runner._lane.calls) == 5
    # Equal in all but its vocabulary, whose tables a recording reads.
    runner.ids(pipeline_of(1), tiny.row_batch(4))
    assert len(runner._lane.calls) == 6


def test_large_batches_are_split(engine: graph.GraphEngine, monkeypatch: pytest.MonkeyPatch):
    engine.fits_no_more_than(4)
    runner, pipeline, batch = engine.runner(), pipeline_of(), tiny.row_batch(11)
    assert torch.equal(runner.ids(pipeline, batch)[0], expected(pipeline, batch))
    assert len(runner._lane.calls) == 1
    x_t, t = torch.randn(11, 20, 16), torch.full((11,), 30)
    torch.testing.assert_close(runner.predict(x_t, t), DENOISER(x_t, t), rtol=1e-5, atol=1e-5)


def test_no_rows_are_no_work(engine: graph.GraphEngine):
    runner = engine.runner()
    found, margins = runner.ids(pipeline_of(), tiny.row_batch(4).part(0, 0))
    assert found.shape == (0, tiny.SEQ_LEN)
    assert margins.shape == (0,)
    assert runner.predict(torch.zeros(0, 20, 16), torch.zeros(0, dtype=torch.int64)).shape[0] == 0
    assert not runner._lane.calls


def test_predictions_leave_as_copies(engine: graph.GraphEngine):
    runner = engine.runner()
    inputs = [(torch.randn(3, 20, 16), torch.tensor([t, 3, t])) for t in (30, 7)]
    found = [runner.predict(*pair) for pair in inputs]
    for x0, pair in zip(found, inputs, strict=True):
        torch.testing.assert_close(x0, DENOISER(*pair), rtol=1e-5, atol=1e-5)
    assert len(runner._lane.calls) == 1


def test_each_recording_is_logged_and_serves_its_bucket(
    engine: graph.GraphEngine, caplog: pytest.LogCaptureFixture
):
    runner, pipeline = engine.runner(), pipeline_of()
    with caplog.at_level("INFO", "dlmone_fast"):
        for rows in (1, 7, 5):
            runner.ids(pipeline, tiny.row_batch(rows))
    assert len(runner._lane.calls) == 2
    assert caplog.text.count("MiB") == 2


def test_recordings_are_bounded(engine: graph.GraphEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph, "_MOST_RECORDINGS", 2)
    runner = engine.runner()
    for steps in (1, 2, 3):
        runner.ids(pipeline_of(steps), tiny.row_batch(1, steps))
    assert [call.work is None for call in runner._lane.calls] == [True, False, False]
    assert len(runner._recordings) == 2


def test_where_memory_ends_parts_get_smaller(
    engine: graph.GraphEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    runner, pipeline, batch = engine.runner(), pipeline_of(), tiny.row_batch(13)
    answers = itertools.chain([False, False], itertools.repeat(True))
    monkeypatch.setattr(HostLane, "fits", lambda self: next(answers))
    assert torch.equal(runner.ids(pipeline, batch)[0], expected(pipeline, batch))
    assert engine.largest == 4
    assert runner._lane.released == 2
    assert "parts of 4" in caplog.text
    monkeypatch.setattr(HostLane, "fits", lambda self: False)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        engine.runner().ids(pipeline, batch)
    assert engine.largest == 1
    assert not CAPTURING.locked()


def test_an_error_that_came_of_missing_memory_is_known():
    # What torch raises where a capture is cut short: the reason is its context.
    second = RuntimeError("capture was invalidated")
    second.__context__ = torch.cuda.OutOfMemoryError("no memory")
    assert is_out_of_memory(second)
    assert not is_out_of_memory(RuntimeError("other"))


def test_eight_threads_share_two_runners(engine: graph.GraphEngine):
    pipeline = pipeline_of()
    batches = [tiny.row_batch(1 + i % 5, seed=i) for i in range(40)]
    free = [engine.runner() for _ in range(engine.runners)]
    leases, waiting = threading.Semaphore(len(free)), threading.Lock()

    def generate(batch: RowBatch) -> torch.Tensor:
        with leases:
            with waiting:
                runner = free.pop()
            found = runner.ids(pipeline, batch)[0]
            free.append(runner)
        return found

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(generate, batches))
    for ids, batch in zip(found, batches, strict=True):
        assert torch.equal(ids, expected(pipeline, batch))


def test_ids_outside_of_the_vocabulary_are_refused_before_the_device(engine: graph.GraphEngine):
    runner, pipeline = engine.runner(), pipeline_of()
    for wrong in (-1, len(pipeline.vocabulary)):
        batch = tiny.row_batch(2)
        batch.ids[1, 3] = wrong
        with pytest.raises(UsageError, match="ids must lie in"):
            runner.ids(pipeline, batch)


def test_a_closed_engine_refuses_and_holds_nothing(engine: graph.GraphEngine):
    runner, pipeline = engine.runner(), pipeline_of()
    runner.ids(pipeline, tiny.row_batch(2))
    call = runner._lane.calls[0]
    engine.close()
    engine.close()
    assert call.work is None
    assert runner._lane.released == 1
    for use in (lambda: runner.ids(pipeline, tiny.row_batch(2)), engine.runner):
        with pytest.raises(ModelNotLoadedError, match="was unloaded"):
            use()


def test_a_fork_is_refused(engine: graph.GraphEngine, monkeypatch: pytest.MonkeyPatch):
    runner, pipeline = engine.runner(), pipeline_of()
    runner.ids(pipeline, tiny.row_batch(2))
    call = runner._lane.calls[0]
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    x_t, t = torch.randn(2, 20, 16), torch.full((2,), 30)
    uses = (
        lambda: runner.ids(pipeline, tiny.row_batch(2)),
        lambda: runner.predict(x_t, t),
        engine.runner,
    )
    for use in uses:
        with pytest.raises(ForkedProcessError, match=f"loaded in process {parent}.*'spawn'"):
            use()
    engine.close()
    assert call.work is not None, "the parent's graphs are not the fork's to drop"


def test_why_it_cannot_run_here(monkeypatch: pytest.MonkeyPatch):
    assert graph.why_not_graph(DENOISER, "int8") == "it has no int8"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(graph.why_not_graph(DENOISER, "fp32"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "it is on cpu" in str(graph.why_not_graph(DENOISER, "fp32"))
