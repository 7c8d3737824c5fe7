from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import native
from dlmone_fast.kernels.nearest_token import (
    Vocabulary,
    nearest_token,
    nearest_token_with_margin,
    reference,
    vocabulary,
)

BACKENDS = ("cpp", "torch")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and not native.is_available():
        pytest.skip(f"native: {native.why_missing()}")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_rounds_as_its_table(backend: str, dtype: torch.dtype, x_dtype: torch.dtype):
    e, x = random(700, 36).to(dtype), random(5, 9, 36, seed=1).to(x_dtype)
    kept = Vocabulary(e)
    expected = reference.nearest_token(x, e)
    for _ in range(2):
        assert torch.equal(nearest_token(x, kept, kernel_backend=backend), expected)
        ids, margin = nearest_token_with_margin(x, kept, kernel_backend=backend)
        assert torch.equal(ids, expected)
        torch.testing.assert_close(margin.double(), reference.margin(x, e), rtol=1e-6, atol=0)


def test_strided_tables(backend: str):
    e, x = random(24, 300).T[::2], random(8, 24, seed=1)
    assert torch.equal(
        nearest_token(x, Vocabulary(e), kernel_backend=backend), reference.nearest_token(x, e)
    )


def test_a_table_is_prepared_once():
    made = []
    kept = Vocabulary(random(4, 3))
    for _ in range(3):
        kept.prepared("name", lambda table: made.append(table))
    assert len(made) == 1
    kept.prepared("another", lambda table: made.append(table))
    assert len(made) == 2


def test_a_change_in_place_is_seen(backend: str):
    e, x = random(130, 20), random(50, 20, seed=1)
    kept = Vocabulary(e)
    before = nearest_token(x, kept, kernel_backend=backend)
    with torch.no_grad():
        e.copy_(e.flip(0))
    after = nearest_token(x, kept, kernel_backend=backend)
    assert torch.equal(after, 129 - before)
    assert torch.equal(after, reference.nearest_token(x, e))


def test_an_optimiser_step_is_seen(backend: str):
    table = torch.nn.Parameter(random(90, 12))
    kept, x = Vocabulary(table), random(30, 12, seed=1)
    nearest_token(x, kept, kernel_backend=backend)
    table.grad = random(90, 12, seed=2)
    torch.optim.AdamW([table], lr=1.0).step()
    assert torch.equal(
        nearest_token(x, kept, kernel_backend=backend), reference.nearest_token(x, table)
    )


def test_what_torch_does_not_count_needs_forget(backend: str):
    e, x = random(130, 20), random(50, 20, seed=1)
    kept = Vocabulary(e)
    nearest_token(x, kept, kernel_backend=backend)
    e.data.copy_(e.flip(0))
    kept.forget()
    assert torch.equal(
        nearest_token(x, kept, kernel_backend=backend), reference.nearest_token(x, e)
    )


def test_tables_without_a_version_counter(backend: str):
    with torch.inference_mode():
        e, x = random(130, 20), random(50, 20, seed=1)
        kept = Vocabulary(e)
        assert torch.equal(
            nearest_token(x, kept, kernel_backend=backend), reference.nearest_token(x, e)
        )


def in_threads(count: int, work: Callable[[], object]) -> list[object]:
    """What `work` gave in threads that start it together."""
    start, results = threading.Barrier(count), []

    def run() -> None:
        start.wait()
        results.append(work())

    workers = [threading.Thread(target=run) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


def test_threads_share_one_preparation():
    kept, calls = Vocabulary(random(4, 3)), []

    def make(table: Tensor) -> Tensor:
        calls.append(1)
        # Long enough for every thread to ask meanwhile.
        time.sleep(0.2)
        return table + 1

    results = in_threads(4, lambda: kept.prepared("slow", make))
    assert len(calls) == 1
    assert len(results) == 4
    assert all(result is results[0] for result in results)


def test_threads_round_alike(backend: str):
    e, x = random(500, 16), random(40, 16, seed=1)
    expected, kept = reference.nearest_token(x, e), Vocabulary(e)
    results = in_threads(4, lambda: nearest_token(x, kept, kernel_backend=backend))
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


def test_a_change_while_preparing_is_not_lost(monkeypatch: pytest.MonkeyPatch):
    if not native.is_available():
        pytest.skip(f"native: {native.why_missing()}")
    e, x = random(130, 20).half(), random(50, 20, seed=1)
    kept, prepared = Vocabulary(e), Vocabulary.prepared

    def changing(self: Vocabulary, key: Hashable, make: Callable[[Tensor], Any]) -> Any:
        made = prepared(self, key, make)
        if key == "fp32" and e[0, 0] != 7:
            # As another thread might, between one preparation and the next.
            e.copy_(e.flip(0))
            e[0, 0] = 7
        return made

    monkeypatch.setattr(Vocabulary, "prepared", changing)
    nearest_token(x, kept, kernel_backend="cpp")
    ids = nearest_token(x, kept, kernel_backend="cpp")
    assert torch.equal(ids, reference.nearest_token(x, e))


def test_one_copy_in_fp32_serves_every_cpu_backend():
    kept, x = Vocabulary(random(60, 10).half()), random(4, 10)
    for name in BACKENDS:
        if name == "torch" or native.is_available():
            nearest_token(x, kept, kernel_backend=name)
            nearest_token_with_margin(x, kept, kernel_backend=name)
    kinds = [made.dtype for _, made in kept._kept.values()]
    assert kinds.count(torch.float32) == 1
    assert len(kinds) == 1 + native.is_available()


def test_what_serves_all_streams_is_finished_and_made_outside_of_captures(
    monkeypatch: pytest.MonkeyPatch,
):
    happened: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: happened.append("waited"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    table = random(3, 2)

    def make(table: Tensor) -> Tensor:
        happened.append("made")
        return table + 1

    assert torch.equal(vocabulary._make_for_all_streams(make, table), table + 1)
    assert happened == ["made", "waited"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UsageError, match=r"call nearest_token once.*before the capture"):
        vocabulary._make_for_all_streams(make, table)
    assert happened == ["made", "waited"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_reads_what_was_prepared_before():
    kept, graph = Vocabulary(random(90, 16).cuda()), torch.cuda.CUDAGraph()
    with pytest.raises(UsageError, match="before the capture"), torch.cuda.graph(graph):
        kept.prepared("copy", torch.clone)
    kept.prepared("copy", torch.clone)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kept.prepared("copy", torch.clone) + 1
    graph.replay()
    assert torch.equal(found, kept.table + 1)


def test_copies_and_pickles_carry_the_table_alone():
    kept = Vocabulary(random(7, 5))
    kept.prepared("something", lambda table: threading.Lock())
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert torch.equal(other.table, kept.table)
        assert other.handle != kept.handle


def test_moving_makes_a_vocabulary_of_the_moved_table():
    kept = Vocabulary(random(7, 5))
    assert kept.to("cpu") is kept
    moved = kept.to("meta")
    assert moved.table.device.type == "meta"
    with pytest.raises(UsageError, match="one device"):
        nearest_token(random(2, 5), moved)


def test_a_vocabulary_is_not_kept_alive_by_its_handle():
    kept = Vocabulary(random(3, 2))
    handle = kept.handle
    assert vocabulary.find(handle) is kept
    del kept
    gc.collect()
    assert vocabulary.find(handle) is None


def test_no_gradients_and_a_name():
    kept = Vocabulary(random(3, 2).requires_grad_())
    assert not kept.table.requires_grad
    assert len(kept) == 3
    assert repr(kept) == "Vocabulary(3 x 2, torch.float32, cpu)"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.zeros(4), "embedding must have shape"),
        (torch.zeros(0, 4), "embedding must have shape"),
        (torch.zeros(4, 2).double(), "embedding must be float32"),
    ],
)
def test_refusals(table: Tensor, message: str):
    with pytest.raises(UsageError, match=message):
        Vocabulary(table)


def test_x_must_fit_the_vocabulary():
    with pytest.raises(UsageError, match=r"x must have shape \[\.\.\., 4\]"):
        nearest_token(random(2, 3), Vocabulary(random(5, 4)))


@pytest.mark.parametrize("wrap", [lambda e: e, Vocabulary], ids=["tensor", "vocabulary"])
def test_both_compile_without_a_break(backend: str, wrap):
    e, x = random(60, 10), random(4, 3, 10, seed=1)
    table = wrap(e)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids = nearest_token(x * 1.0, table, kernel_backend=backend)
        return ids, *nearest_token_with_margin(x * 1.0, table, kernel_backend=backend)

    ids, again, margin = both(x)
    assert torch.equal(ids, reference.nearest_token(x, e))
    assert torch.equal(again, ids)
    torch.testing.assert_close(margin.double(), reference.margin(x, e), rtol=1e-6, atol=0)


def test_a_compiled_function_sees_a_change_in_place(backend: str):
    e, x = random(60, 10), random(9, 10, seed=1)
    kept = Vocabulary(e)
    compiled = torch.compile(
        lambda x: nearest_token(x, kept, kernel_backend=backend), backend="aot_eager"
    )
    before = compiled(x)
    e.copy_(e.flip(0))
    assert torch.equal(compiled(x), 59 - before)


def test_the_operations_have_correct_fakes():
    x, e = random(3, 6), random(8, 6, seed=1)
    for op in (
        torch.ops.dlmone_fast.nearest_token,
        torch.ops.dlmone_fast.nearest_token_with_margin,
    ):
        torch.library.opcheck(op.default, (x, e, 0, "torch"))
