"""The CUDA kernels of nearest-token rounding, on a GPU where there is one and emulated anywhere.

The emulation (tests/kernels/cuda_emulation) compiles the kernels' own source for the CPU, so index
arithmetic, shared-memory layout, reductions and tie rules are those that a GPU runs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dlmone_fast.errors import BackendUnavailableError
from dlmone_fast.kernels import dispatch, native
from dlmone_fast.kernels.nearest_token import Vocabulary, cuda, nearest_token, reference

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).resolve().parent / "cuda_emulation"
SOURCES = ROOT / "csrc" / "cuda"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# A few multiprocessors: small shapes then have several splits and several tiles in a split.
MULTIPROCESSORS = 2

Nearest = Callable[..., tuple[Tensor, Tensor | None]]


class Job(ctypes.Structure):
    """csrc/cuda/nearest_token.h, NearestToken."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("x_type", ctypes.c_int),
        ("n", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("embedding", ctypes.c_void_p),
        ("embedding_type", ctypes.c_int),
        ("v", ctypes.c_int64),
        ("embedding_stride", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("search_x", ctypes.c_void_p),
        ("search_x_stride", ctypes.c_int64),
        ("search_table", ctypes.c_void_p),
        ("search_table_stride", ctypes.c_int64),
        ("search_type", ctypes.c_int),
        ("half_norms", ctypes.c_void_p),
        ("operand_roundoff", ctypes.c_double),
        ("ids", ctypes.c_void_p),
        ("margins", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("multiprocessors", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    ]


class Emulation:
    """The kernels on the CPU; `unclear` and `measured_in_full` count tokens of the last call."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.workspace_bytes.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int]
        self.library.workspace_bytes.restype = ctypes.c_int64
        self.library.nearest_token.restype = ctypes.c_char_p
        self.unclear = self.measured_in_full = 0

    def __call__(
        self,
        x: Tensor,
        e: Tensor,
        with_margin: bool = False,
        *,
        copies_at_once: bool = False,
        threads_reversed: bool = False,
        multiprocessors: int = MULTIPROCESSORS,
    ) -> tuple[Tensor, Tensor | None]:
        dtype, roundoff = cuda.search_format(x.dtype, e.dtype)
        search_x, search_table = cuda.search_copy(x, dtype), cuda.search_copy(e, dtype)
        norms = cuda.half_norms(e)
        x, e = cuda._unit_stride(x), cuda._unit_stride(e)
        n, v, d = len(x), len(e), x.shape[1]
        ids = torch.full((n,), -1)
        margin = torch.full((n,), -1.0) if with_margin else None
        size = self.library.workspace_bytes(n, v, d, multiprocessors)
        workspace = torch.full((size // 8 + 3,), -1)
        base = -(-workspace.data_ptr() // 16) * 16
        job = Job(
            x=x.data_ptr(),
            x_type=FLOATS.index(x.dtype),
            n=n,
            x_stride=x.stride(0),
            embedding=e.data_ptr(),
            embedding_type=FLOATS.index(e.dtype),
            v=v,
            embedding_stride=e.stride(0),
            d=d,
            search_x=search_x.data_ptr(),
            search_x_stride=search_x.stride(0),
            search_table=search_table.data_ptr(),
            search_table_stride=search_table.stride(0),
            search_type=FLOATS.index(dtype),
            half_norms=norms.data_ptr(),
            operand_roundoff=roundoff,
            ids=ids.data_ptr(),
            margins=margin.data_ptr() if margin is not None else None,
            workspace=base,
            multiprocessors=multiprocessors,
            stream=None,
        )
        counts = (ctypes.c_int * 2)()
        failure = self.library.nearest_token(
            ctypes.byref(job), int(copies_at_once), int(threads_reversed), counts
        )
        assert not failure, failure.decode()
        self.unclear, self.measured_in_full = counts
        return ids, margin


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found: the emulation cannot be built")
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-I", str(SOURCES)]
    command += [str(EMULATION / name) for name in ("nearest_token.cpp", "emulation.cpp")]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Emulation(library)


@pytest.fixture(params=["emulated", "gpu"])
def nearest(request: pytest.FixtureRequest) -> Nearest:
    """(x, e, with_margin) -> ids and margin, on the CPU; computed by the kernels."""
    if request.param == "emulated":
        return request.getfixturevalue("emulation")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    reason = cuda.usable(torch.empty(1, 1, device="cuda"), torch.empty(1, 1))
    if reason:
        pytest.skip(reason)

    def on_gpu(x: Tensor, e: Tensor, with_margin: bool = False) -> tuple[Tensor, Tensor | None]:
        ids, margin = search(on_device(x), on_device(e), with_margin)
        return ids.cpu(), None if margin is None else margin.cpu()

    return on_gpu


def on_device(matrix: Tensor) -> Tensor:
    """A copy on the GPU with the same strides."""
    storage = torch.empty(0, dtype=matrix.dtype).set_(matrix.untyped_storage())
    return storage.cuda().as_strided(matrix.shape, matrix.stride(), matrix.storage_offset())


def search(x: Tensor, e: Tensor, with_margin: bool = False) -> tuple[Tensor, Tensor | None]:
    return cuda.search(x, Vocabulary(e, transient=True), with_margin)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_exact(nearest: Nearest, x: Tensor, e: Tensor) -> None:
    """Ids without and with margins, and the margins, are those of the fp64 distances."""
    expected = reference.nearest_token(x, e)
    assert torch.equal(nearest(x, e)[0], expected)
    ids, margin = nearest(x, e, True)
    assert torch.equal(ids, expected)
    assert margin is not None
    assert margin.dtype == torch.float32
    assert torch.equal(margin, reference.margin(x, e).float())


def assert_search_decided(emulation: Emulation, n: int, exact_operands: bool = True) -> None:
    """The last call's ids come from the search: measuring every row would hide its mistakes."""
    assert emulation.measured_in_full == 0
    if exact_operands:
        assert emulation.unclear <= n // 20


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("n", "v", "d"),
    [
        (1, 1, 1),
        (1, 700, 8),
        (2, 7, 64),
        (7, 64, 65),
        (33, 65, 16),
        (5, 130, 128),
        (3, 129, 256),
        (130, 127, 17),
    ],
)
def test_ids_and_margins_are_the_fp64_answer(
    nearest: Nearest, n: int, v: int, d: int, dtype: torch.dtype
):
    x, e = random(n, d).to(dtype), random(v, d, seed=1).to(dtype)
    assert_exact(nearest, x, e)
    if isinstance(nearest, Emulation):
        nearest(x, e)
        assert_search_decided(nearest, n, exact_operands=dtype != torch.float32)


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("e_dtype", FLOATS)
def test_operands_of_different_types(nearest: Nearest, x_dtype: torch.dtype, e_dtype: torch.dtype):
    assert_exact(nearest, random(9, 20).to(x_dtype), random(90, 20, seed=1).to(e_dtype))


def test_strided_views(nearest: Nearest):
    x = random(20, 2, 24)[:, 1, ::2]
    e = random(300, 40)[::3, 5:17]
    assert_exact(nearest, x, e)
    assert_exact(nearest, x.bfloat16(), random(12, 100).bfloat16().T)
    assert_exact(nearest, x[:1].expand(9, 12), e)
    # Rows that are aligned for the search but not packed.
    wide = random(40, 48).half()
    assert_exact(nearest, wide[::2, 16:32], wide[:, :16])


def test_no_tokens(nearest: Nearest):
    ids, margin = nearest(random(0, 12), random(5, 12), True)
    assert ids.shape == (0,)
    assert margin is not None
    assert margin.shape == (0,)


def test_lowest_id_wins_among_duplicate_rows(nearest: Nearest):
    e = random(40, 19).repeat(5, 1).bfloat16()
    x = e[torch.arange(0, 200, 3)] + 0.01 * random(67, 19, seed=2).bfloat16()
    ids, margin = nearest(x, e, True)
    assert torch.equal(ids, torch.arange(0, 200, 3) % 40)
    assert margin is not None
    assert margin.eq(0).all()


@pytest.mark.parametrize("threads_reversed", [False, True])
def test_lowest_id_wins_in_whatever_order_candidates_come(
    emulation: Emulation, threads_reversed: bool
):
    # Equal rows side by side belong to different lanes, which list them in any order.
    e = random(12, 19).repeat_interleave(8, 0).bfloat16()
    ids, _ = emulation(e[::8], e, threads_reversed=threads_reversed)
    assert emulation.unclear == 12
    assert emulation.measured_in_full == 0
    assert ids.tolist() == list(range(0, 96, 8))


def test_more_equal_rows_than_the_list_of_candidates_holds(nearest: Nearest):
    e = random(1, 33).expand(150, 33).contiguous()
    x = random(9, 33, seed=1)
    assert nearest(x, e)[0].eq(0).all()
    if isinstance(nearest, Emulation):
        assert nearest.measured_in_full == 9


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_near_ties_that_16_bits_cannot_order(nearest: Nearest, scale: float):
    # Six points, each 12 times moved by an ulp or two of fp32: the copies are all equal.
    centres = 4 + random(6, 40)
    e = centres.repeat(12, 1)
    ulps = torch.randint(-2, 3, e.shape, generator=torch.Generator().manual_seed(3))
    e = (e * (1 + ulps * 2.0**-23) * scale).contiguous()
    x = (centres + 0.02 * random(6, 40, seed=4)) * scale
    assert_exact(nearest, x, e)
    if isinstance(nearest, Emulation):
        assert nearest.unclear == 6
        assert nearest.measured_in_full == 0


def test_clear_tokens_need_no_second_search(emulation: Emulation):
    e = random(200, 64).bfloat16()
    x = e[:50] + 0.05 * random(50, 64, seed=1).bfloat16()
    assert emulation(x, e)[0].tolist() == list(range(50))
    assert emulation.unclear == 0


def test_rounded_copies_leave_few_tokens_unclear_and_none_to_the_whole_table(emulation: Emulation):
    x, e = random(130, 32), random(300, 32, seed=1)
    assert torch.equal(emulation(x, e)[0], reference.nearest_token(x, e))
    assert 0 < emulation.unclear < 130
    assert emulation.measured_in_full == 0


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e-22, 1e18, 1e30, 2e38])
def test_extreme_magnitudes(nearest: Nearest, magnitude: float):
    assert_exact(nearest, random(5, 10) * magnitude, random(70, 10, seed=1) * magnitude)


@pytest.mark.parametrize(("large", "tiny"), [(1e30, 1e-39), (1e15, 1e-23)])
def test_large_tokens_near_a_tiny_table(nearest: Nearest, large: float, tiny: float):
    # The table's copies are subnormal or its half norms zero, and what that loses is multiplied
    # by a large token.
    x = random(5, 10).bfloat16() * large
    assert_exact(nearest, x, random(70, 10, seed=1).bfloat16() * tiny)


def test_non_finite_values_never_win(nearest: Nearest):
    e = random(100, 6)
    x = random(8, 6, seed=1)
    expected = reference.nearest_token(x, e[2:]) + 2
    e[0, 3], e[1, 2] = torch.nan, torch.inf
    assert torch.equal(nearest(x, e)[0], expected)
    x[2, 0], x[5, 1] = torch.nan, -torch.inf
    expected[2] = expected[5] = 0
    ids, margin = nearest(x, e, True)
    assert torch.equal(ids, expected)
    assert margin is not None
    assert margin[[2, 5]].eq(0).all()
    assert margin.isfinite().all()


def test_a_table_that_is_half_not_a_number(nearest: Nearest):
    x, e = random(8, 6), random(100, 6, seed=1)
    e[7:60] = torch.nan
    assert_exact(nearest, x, e)


def test_margin_without_a_second_distance(nearest: Nearest):
    x, table = random(4, 6), torch.full((90, 6), torch.inf)
    table[67] = 1
    ids, margin = nearest(x, table, True)
    assert ids.eq(67).all()
    assert margin is not None
    assert margin.eq(torch.inf).all()


@pytest.mark.parametrize("copies_at_once", [False, True])
@pytest.mark.parametrize("threads_reversed", [False, True])
def test_neither_the_order_of_threads_nor_the_moment_of_a_copy_matters(
    emulation: Emulation, copies_at_once: bool, threads_reversed: bool
):
    # Seven tiles in a split: the ring of buffers goes round several times.
    mode = {"copies_at_once": copies_at_once, "threads_reversed": threads_reversed}
    for d in (24, 130):
        x, e = random(40, d).half(), random(830, d, seed=1).half()
        expected = reference.nearest_token(x, e)
        assert torch.equal(emulation(x, e, multiprocessors=1, **mode)[0], expected)
        assert_search_decided(emulation, 40)
        ids, margin = emulation(x, e, True, multiprocessors=1, **mode)
        assert_search_decided(emulation, 40, exact_operands=False)
        assert torch.equal(ids, expected)
        assert margin is not None
        assert torch.equal(margin, reference.margin(x, e).float())


@pytest.mark.parametrize("multiprocessors", [1, 3, 50])
def test_the_number_of_splits_changes_nothing(emulation: Emulation, multiprocessors: int):
    x, e = random(35, 12).bfloat16(), random(700, 12, seed=1).bfloat16()
    ids, _ = emulation(x, e, multiprocessors=multiprocessors)
    assert_search_decided(emulation, 35)
    assert torch.equal(ids, reference.nearest_token(x, e))


def test_eight_warps_and_two_token_tiles(emulation: Emulation):
    x, e = random(270, 10).half(), random(150, 10, seed=1).half()
    assert_exact(emulation, x, e)
    emulation(x, e)
    assert_search_decided(emulation, 270)


@pytest.mark.parametrize("multiprocessors", [84, 108, 132, 144])
def test_workspace_is_a_thousandth_of_the_scores(emulation: Emulation, multiprocessors: int):
    n, v = 16_384, 30_522
    size = emulation.library.workspace_bytes(n, v, 128, multiprocessors)
    assert size * 1000 <= 4 * n * v
    small = emulation.library.workspace_bytes(128, v, 128, multiprocessors)
    assert small <= 1 << 20


def plan(emulation: Emulation, n: int, multiprocessors: int) -> dict[str, int]:
    values = (ctypes.c_int * 5)()
    sizes = [ctypes.c_int64(size) for size in (n, 30_522, 128)]
    emulation.library.describe_plan(*sizes, multiprocessors, values)
    names = ("warps", "token_tiles", "tiles", "splits", "resident")
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("multiprocessors", [84, 108, 132])
@pytest.mark.parametrize("n", [1, 128, 1024, 4096, 16_384, 100_000])
def test_every_multiprocessor_has_work(emulation: Emulation, n: int, multiprocessors: int):
    chosen = plan(emulation, n, multiprocessors)
    blocks = chosen["token_tiles"] * chosen["splits"]
    assert chosen["token_tiles"] * chosen["warps"] * 32 >= n
    assert chosen["splits"] <= chosen["tiles"]
    assert blocks >= 0.7 * chosen["resident"]
    waves = -(-blocks // chosen["resident"])
    assert blocks / (waves * chosen["resident"]) > 0.7


def test_search_copies():
    exact = random(5, 32).half()
    assert cuda.search_format(torch.float16, torch.float16) == (torch.float16, 0.0)
    assert cuda.search_copy(exact, torch.float16).data_ptr() == exact.data_ptr()
    dtype, roundoff = cuda.search_format(torch.float32, torch.bfloat16)
    x = random(5, 17)
    copy = cuda.search_copy(x, dtype)
    assert copy.shape == (5, 32)
    assert copy[:, 17:].eq(0).all()
    assert ((copy[:, :17].float() - x).abs() <= roundoff * x.abs()).all()
    shifted = exact.flatten()[8:-24].view(4, 32)[:, :16]
    assert cuda.search_copy(shifted, torch.float16).data_ptr() == shifted.data_ptr()
    odd = exact.flatten()[1:129].view(4, 32)
    assert cuda.search_copy(odd, torch.float16).data_ptr() % 16 == 0


def test_usable_names_the_reason(monkeypatch: pytest.MonkeyPatch):
    assert cuda.usable(random(2, 3), random(4, 3)) == "it runs on CUDA tensors, not on cpu"

    class OnGpu:
        device = torch.device("cuda")
        shape = torch.Size([2, 257])

        def __len__(self) -> int:
            return 2

    capability = [(7, 5), (8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(native, "why_missing", lambda: "it was left out")
    monkeypatch.setattr(native, "is_available", lambda: False)
    assert cuda.usable(OnGpu(), OnGpu()) == "it was left out"
    monkeypatch.setattr(native, "is_available", lambda: True)
    extension = type("Extension", (), {"built_with_cuda": False})
    monkeypatch.setattr(native, "module", lambda: extension)
    assert "built without CUDA" in str(cuda.usable(OnGpu(), OnGpu()))
    extension.built_with_cuda = True
    assert "capability 8.0 or newer, and cuda has 7.5" in str(cuda.usable(OnGpu(), OnGpu()))
    capability.pop(0)
    assert "at most 256 channels, got 257" in str(cuda.usable(OnGpu(), OnGpu()))
    OnGpu.shape = torch.Size([2, 256])
    assert cuda.usable(OnGpu(), OnGpu()) is None


CPU = torch.device("cpu")


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device was tested yet."""
    monkeypatch.setattr(cuda, "_tested", {})


def test_the_self_test_passes_on_right_kernels(
    emulation: Emulation, untested: None, monkeypatch: pytest.MonkeyPatch
):
    cases: list[tuple[int, bool]] = []

    def emulated(x: Tensor, vocabulary: Vocabulary, with_margin: bool) -> tuple:
        cases.append((len(x), with_margin))
        return emulation(x, vocabulary.table, with_margin)

    monkeypatch.setattr(cuda, "search", emulated)
    for _ in range(2):
        assert cuda.self_test(CPU) is None
    # Once a device, with and without margins.
    assert cases == [(n, m) for n, *_ in cuda._CASES for m in (True, False)]


def next_to_right(x: Tensor, vocabulary: Vocabulary, with_margin: bool) -> tuple:
    ids, margin = right(x, vocabulary, with_margin)
    return (ids + 1) % len(vocabulary), margin


def of_another_margin(x: Tensor, vocabulary: Vocabulary, with_margin: bool) -> tuple:
    ids, margin = right(x, vocabulary, with_margin)
    return ids, None if margin is None else margin * 1.001


def stopping(x: Tensor, vocabulary: Vocabulary, with_margin: bool) -> tuple:
    raise RuntimeError("no kernel image is available")


def right(x: Tensor, vocabulary: Vocabulary, with_margin: bool) -> tuple:
    table = vocabulary.table
    margin = reference.margin(x, table).float() if with_margin else None
    return reference.nearest_token(x, table), margin


@pytest.mark.parametrize(
    ("search", "reason"),
    [
        (next_to_right, "ids or margins of 1 tokens in torch.float32"),
        (of_another_margin, "ids or margins of 7 tokens in torch.float16"),
        (stopping, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_failed_self_test_is_a_reason_to_fall_back_or_to_refuse(
    untested: None, monkeypatch: pytest.MonkeyPatch, search: Nearest, reason: str
):
    monkeypatch.setattr(cuda, "search", search)
    monkeypatch.setattr(cuda, "usable", lambda x, embedding: None)
    on_this_device = tuple(
        dataclasses.replace(backend, device="cpu") if backend.name == "cuda" else backend
        for backend in dispatch.backends("nearest_token")
    )
    monkeypatch.setitem(dispatch._BACKENDS, "nearest_token", on_this_device)
    x, e = random(4, 6), random(9, 6, seed=1)
    # "auto" falls back, and the reason stands where `doctor` looks.
    assert torch.equal(nearest_token(x, e), reference.nearest_token(x, e))
    assert f"its self-test on cpu failed: {reason}" in str(on_this_device[0].usable(x, e))
    with pytest.raises(BackendUnavailableError, match=f"its self-test on cpu failed: {reason}"):
        nearest_token(x, e, kernel_backend="cuda")


def test_auto_takes_kernels_that_passed(untested: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "search", right)
    monkeypatch.setattr(cuda, "usable", lambda x, embedding: None)
    backend = dataclasses.replace(dispatch.backends("nearest_token")[0], device="cpu")
    monkeypatch.setitem(dispatch._BACKENDS, "nearest_token", (backend,))
    x, e = random(4, 6), random(9, 6, seed=1)
    assert dispatch.select("nearest_token", x, e).name == "cuda"


def test_memory_that_runs_out_says_nothing_of_the_kernels(
    untested: None, monkeypatch: pytest.MonkeyPatch
):
    def full(x: Tensor, vocabulary: Vocabulary, with_margin: bool) -> tuple:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(cuda, "search", full)
    with pytest.raises(torch.OutOfMemoryError):
        cuda.self_test(CPU)
    monkeypatch.setattr(cuda, "search", right)
    assert cuda.self_test(CPU) is None


def test_nothing_is_tested_while_a_graph_is_captured(
    untested: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    reason = cuda.self_test(torch.device("cuda:0"))
    assert reason is not None
    assert "call nearest_token once before the capture" in reason
    assert not cuda._tested


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_this_gpu_passes_the_self_test():
    place = torch.device("cuda", torch.cuda.current_device())
    reason = cuda.usable(torch.empty(1, 1, device=place), torch.empty(1, 1))
    if reason:
        pytest.skip(reason)
    assert cuda.self_test(place) is None


with_cuda_build = pytest.mark.skipif(
    not native.is_available() or not native.module().built_with_cuda,
    reason=f"the extension has no CUDA part: {native.why_missing() or 'built without nvcc'}",
)


@with_cuda_build
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": -1}, r"n must lie in \[0, 1073741824\], got -1"),
        ({"v": 0}, "v must lie in"),
        ({"d": 257}, r"d must lie in \[1, 256\], got 257"),
        ({"multiprocessors": 0}, "multiprocessors must lie in"),
        ({"x": 0}, "x is a null pointer"),
        ({"embedding": 4098}, "embedding is not aligned to 4 bytes"),
        ({"search_x": 4104}, "search_x is not aligned to 16 bytes"),
        ({"search_table_stride": 20}, "search_table has rows that are not aligned to 16 bytes"),
        ({"search_x_stride": -16}, "search_x has a negative row stride"),
        ({"embedding_stride": 1 << 60}, "address space"),
        ({"n": 0, "x_stride": 1 << 62}, "x does not fit the address space"),
        ({"x_type": 3}, "x_type must lie in"),
        ({"search_type": 0}, "search_type must be a 16-bit type"),
        ({"half_norms": 0}, "half_norms is a null pointer"),
        ({"operand_roundoff": float("nan")}, "operand_roundoff must lie in"),
        ({"ids": 4100}, "ids is not aligned to 8 bytes"),
        ({"margins": 2}, "margins is a misaligned pointer"),
        ({"workspace": 0}, "workspace is a null pointer"),
        ({"workspace_bytes": 16}, r"workspace needs \d+ bytes, got 16"),
    ],
)
def test_the_native_side_refuses_what_it_cannot_read(change: dict, message: str):
    # Refused before anything is launched: no device is needed, no address is read.
    with pytest.raises(ValueError, match=message):
        native.module().cuda_nearest_token(**{**arguments(), **change})


def arguments() -> dict:
    address = 4096
    names = ("x", "embedding", "search_x", "search_table", "half_norms", "ids", "workspace")
    strides = ("x_stride", "embedding_stride", "search_x_stride", "search_table_stride")
    return {
        **dict.fromkeys(names, address),
        **dict.fromkeys(strides, 16),
        "n": 2,
        "v": 5,
        "d": 9,
        "x_type": 0,
        "embedding_type": 0,
        "search_type": 2,
        "operand_roundoff": 0.0,
        "margins": 0,
        "workspace_bytes": 1 << 20,
        "multiprocessors": 4,
        "stream": 0,
    }


@with_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would run it")
def test_a_launch_that_fails_is_named():
    with pytest.raises(RuntimeError, match=r"nearest_token: .*: cudaError"):
        native.module().cuda_nearest_token(**arguments())


@with_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would run it")
@pytest.mark.parametrize("with_margin", [False, True])
def test_run_hands_over_arguments_that_the_native_side_accepts(
    monkeypatch: pytest.MonkeyPatch, with_margin: bool
):
    # Without a device the launch fails, but only after every argument was checked.
    properties = SimpleNamespace(multi_processor_count=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    with pytest.raises(RuntimeError, match=r"nearest_token: .*: cudaError"):
        search(random(3, 20, 2)[..., 0], random(7, 20).half(), with_margin)
    ids, margin = search(random(0, 20), random(7, 20), with_margin)
    assert ids.shape == (0,)
    assert (margin is not None) == with_margin


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "v", "d"), [(128, 30_522, 128), (4097, 5003, 100), (300, 3000, 256)])
def test_large_shapes_on_a_gpu(n: int, v: int, d: int, dtype: torch.dtype):
    x, e = random(n, d).to(dtype).cuda(), random(v, d, seed=1).to(dtype).cuda()
    ids, margin = search(x, e, True)
    assert torch.equal(ids, reference.nearest_token(x, e))
    assert margin is not None
    assert torch.equal(margin, reference.margin(x, e).float())
    assert torch.equal(search(x, e)[0], ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_captured_graph_follows_its_inputs():
    e = random(3000, 128, seed=1).cuda().bfloat16()
    x = random(200, 128).cuda().bfloat16()
    search(x, e)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, _ = search(x, e)
    for seed in (2, 3):
        x.copy_(random(200, 128, seed=seed))
        graph.replay()
        assert torch.equal(ids, reference.nearest_token(x, e))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the assembler says of the kernels for d <= 128 in bf16, both architectures."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("nvcc was not found")
    folder = tmp_path_factory.mktemp("nvcc")
    source = folder / "kernels.cu"
    source.write_text(
        '#include "warp.cuh"\n#include "nearest_token_launch.cuh"\nnamespace dlmone::cuda {\n'
        + "".join(f"template __global__ void {kernel};\n" for kernel in COMPILED)
        + "}\n"
    )
    command = [compiler, "-std=c++17", "-O3", "-c", "-I", str(SOURCES), "-Xptxas", "-v"]
    for arch in ("80", "90a"):
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run(
        [*command, str(source), "-o", str(folder / "kernels.o")],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


COMPILED = (
    "search_kernel<__nv_bfloat16, 8, 3, KeepMinima>(Search)",
    "search_kernel<__nv_bfloat16, 8, 3, ListCandidates>(Search)",
    "search_kernel<__half, 16, 2, KeepMinima>(Search)",
    "decide_kernel<float, 4>(Decide)",
)


def test_kernels_compile_without_spills(compiled: str):
    assert set(re.findall(r"for '(sm_\w+)'", compiled)) == {"sm_80", "sm_90a"}
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled)
    assert len(spills) == 2 * len(COMPILED)
    assert set(spills) == {("0", "0")}


def test_two_search_blocks_fit_a_multiprocessor(compiled: str):
    # 256 threads a block and 65,536 registers: more than 128 would halve the warps in flight.
    found = re.findall(r"search_kernelI\w*?Li8E.*?Used (\d+) registers", compiled, re.DOTALL)
    assert len(found) == 4
    assert all(int(registers) <= 128 for registers in found)
