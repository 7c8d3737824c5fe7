from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlmone_fast.errors import BackendUnavailableError, UsageError
from dlmone_fast.kernels import dispatch, native
from dlmone_fast.kernels.nearest_token import (
    Vocabulary,
    nearest_token,
    nearest_token_with_margin,
    reference,
)
from dlmone_fast.kernels.nearest_token.native import search

# The paths of the native backend, on a table packed once ("/packed") and at every call.
PATHS = ("avx512_vnni/packed", "avx512/packed", "avx512", "avx2/packed", "avx2",
         "portable/packed", "portable")  # fmt: skip
BACKENDS = ("torch", *PATHS)


def native_path(parameter: str) -> tuple[str, bool]:
    """The path and whether its table is used once; skips where this machine lacks the path."""
    path, _, packed = parameter.partition("/")
    if path not in native.cpu_paths():
        pytest.skip(f"no native path {path} here: {native.why_missing() or 'other CPU'}")
    return path, not packed


@pytest.fixture(params=BACKENDS)
def nearest(request: pytest.FixtureRequest):
    """nearest_token on each backend, and on each instruction set of the native one."""
    if request.param == "torch":
        return lambda x, e: nearest_token(x, e, kernel_backend="torch")
    path, transient = native_path(request.param)

    def on_path(x: Tensor, e: Tensor) -> Tensor:
        vocabulary = Vocabulary(e, transient=transient)
        return search(x.reshape(-1, x.shape[-1]), vocabulary, False, path)[0].view(x.shape[:-1])

    return on_path


@pytest.fixture(params=BACKENDS)
def with_margin(request: pytest.FixtureRequest):
    """nearest_token_with_margin on each backend and instruction set."""
    if request.param == "torch":
        return lambda x, e: nearest_token_with_margin(x, e, kernel_backend="torch")
    path, transient = native_path(request.param)
    return lambda x, e: search(x, Vocabulary(e, transient=transient), True, path)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unaligned(*shape: int) -> Tensor:
    """fp32 whose first byte is not a multiple of four."""
    count = math.prod(shape)
    memory = bytearray(4 * count + 4)
    return torch.frombuffer(memory, dtype=torch.float32, offset=1, count=count).view(shape)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


@pytest.mark.parametrize(
    ("n", "v", "d"),
    [
        (1, 1, 1),
        (1, 1000, 128),
        (5, 2, 3),
        (7, 63, 8),
        (6, 64, 16),
        (13, 65, 17),
        (130, 129, 31),
        (37, 1021, 100),
        (1025, 66, 5),
    ],
    ids=lambda value: str(value),
)
def test_ids_are_the_fp64_answer(nearest, n: int, v: int, d: int):
    x, e = random(n, d), random(v, d, seed=1)
    assert torch.equal(nearest(x, e), reference.nearest_token(x, e))


def test_leading_shape_is_kept(nearest):
    e = random(50, 12)
    assert nearest(random(2, 3, 12), e).shape == (2, 3)
    assert nearest(random(12), e).shape == ()
    assert nearest(random(0, 12), e).shape == (0,)
    assert nearest(random(4, 0, 12), e).dtype == torch.int64


def test_strided_views(nearest):
    x = random(20, 2, 24)[:, 1, ::2]
    e = random(300, 40)[::3, 5:17]
    transposed = random(12, 100).T
    assert torch.equal(nearest(x, e), reference.nearest_token(x, e))
    assert torch.equal(nearest(x, transposed), reference.nearest_token(x, transposed))
    assert torch.equal(nearest(x[:1].expand(9, 12), e), nearest(x[:1], e).expand(9))


def test_lowest_id_wins_among_duplicate_rows(nearest):
    e = random(40, 19).repeat(5, 1)
    x = e[torch.arange(199, -1, -1)] + 0.01 * random(200, 19, seed=2)
    assert torch.equal(nearest(x, e), torch.arange(199, -1, -1) % 40)


def test_one_row_repeated_gives_id_zero(nearest):
    e = random(1, 33).expand(500, 33).contiguous()
    assert nearest(random(9, 33, seed=1), e).eq(0).all()


def test_opposite_rows_tie_at_the_origin(nearest):
    e = torch.tensor([[3.0, 0.0], [0.0, -1.0], [0.0, 1.0], [-1.0, 0.0]])
    assert nearest(torch.zeros(3, 2), e).tolist() == [1, 1, 1]


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_near_ties_that_fp32_cannot_order(nearest, scale: float):
    # Every row of the table is one of 20 points moved by an ulp or two: fp32 scores, whose
    # rounding grows with the norm, are blind to the difference.
    centres = 4 + random(20, 64)
    e = centres.repeat(15, 1)
    ulps = torch.randint(-2, 3, e.shape, generator=generator(3))
    e = (e * (1 + ulps * 2.0**-23) * scale).contiguous()
    x = (centres + 0.02 * random(20, 64, seed=4)) * scale
    expected = reference.nearest_token(x, e)
    fp32 = torch.addmm(e.square().sum(1) / 2, x, e.T, alpha=-1).argmin(1)
    assert not torch.equal(fp32, expected), "the case is too easy to prove anything"
    assert torch.equal(nearest(x, e), expected)


def test_a_table_that_8_bits_cannot_tell_apart(nearest):
    # More panels stay open than a coarse search waits for: fp32 decides these tokens.
    e = random(1, 40) + 1e-3 * random(5000, 40, seed=1)
    x = torch.cat([e[::500] + 1e-4 * random(10, 40, seed=2), 3 * random(3, 40, seed=3)])
    assert torch.equal(nearest(x, e), reference.nearest_token(x, e))


@pytest.mark.parametrize("size", [50.0, 3e7])
def test_outliers_that_take_all_of_an_integer(nearest, size: float):
    # One channel fills the 8 bits and leaves nothing for the others.
    x, e = random(70, 30), random(900, 30, seed=1)
    e[::7, 3] = x[::5, 3] = size
    x[1, :], e[5, :] = 0.0, 0.0
    e[6, 1:], x[3, 1:] = 0.0, 0.0
    assert torch.equal(nearest(x, e), reference.nearest_token(x, e))


def test_one_row_and_one_token_beyond_the_range_of_the_search(nearest):
    x, e = random(30, 12), random(200, 12, seed=1)
    e[17] *= 1e25
    x[4] *= 1e25
    x[9] *= 1e-25
    assert torch.equal(nearest(x, e), reference.nearest_token(x, e))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e18, 1e30])
def test_extreme_magnitudes(nearest, magnitude: float):
    # The squares of these leave fp32's range; fp64 still orders them.
    x, e = random(11, 10) * magnitude, random(150, 10, seed=1) * magnitude
    assert torch.equal(nearest(x, e), reference.nearest_token(x, e))


def test_lowest_id_wins_where_fp64_sees_no_difference(nearest):
    x, e = random(12, 10), random(200, 10, seed=1)
    for scale in (1e7, 1e9, 1e11, 1e16):
        assert torch.equal(nearest(scale * x, e), reference.nearest_token(scale * x, e))


def test_non_finite_values_never_win(nearest):
    e = random(100, 6)
    x = random(8, 6, seed=1)
    expected = reference.nearest_token(x, e[2:]) + 2
    e[0, 3], e[1, 2] = torch.nan, torch.inf
    assert torch.equal(nearest(x, e), expected)
    x[2, 0], x[5, 1] = torch.nan, -torch.inf
    expected[2] = expected[5] = 0
    assert torch.equal(nearest(x, e), expected)


@pytest.mark.parametrize(
    ("n", "v", "d"), [(1, 2, 1), (7, 63, 8), (6, 64, 16), (130, 129, 31), (1025, 66, 5)]
)
def test_margins_are_the_fp64_differences(with_margin, n: int, v: int, d: int):
    x, e = random(n, d), random(v, d, seed=1)
    ids, margin = with_margin(x, e)
    assert torch.equal(ids, reference.nearest_token(x, e))
    assert margin.dtype == torch.float32
    torch.testing.assert_close(margin.double(), reference.margin(x, e), rtol=1e-6, atol=0)


def test_margins_of_near_ties_beyond_fp32(with_margin):
    # One ulp of the large table is far more than the rounding of its scores.
    centres = 4 + random(30, 64)
    e = centres.repeat(9, 1)
    e = e * (1 + torch.randint(-2, 3, e.shape, generator=generator(3)) * 2.0**-23)
    x = centres + 0.02 * random(30, 64, seed=4)
    ids, margin = with_margin(x, e)
    assert torch.equal(ids, reference.nearest_token(x, e))
    torch.testing.assert_close(margin.double(), reference.margin(x, e), rtol=1e-5, atol=1e-12)


def test_duplicate_rows_have_margin_zero(with_margin):
    e = random(80, 19).repeat(3, 1)
    ids, margin = with_margin(e + 0.01 * random(240, 19, seed=2), e)
    assert torch.equal(ids, torch.arange(240) % 80)
    assert margin.eq(0).all()


def test_margin_without_a_second_or_a_first_distance(with_margin):
    x = random(4, 6)
    assert with_margin(x, random(1, 6, seed=1))[1].eq(torch.inf).all()
    table = random(90, 6, seed=1)
    x[2, 0] = torch.nan
    ids, margin = with_margin(x, table)
    assert ids[2] == 0
    assert margin[2] == 0
    table[:89] = torch.inf
    ids, margin = with_margin(x[:2], table)
    assert ids.eq(89).all()
    assert margin.eq(torch.inf).all()


def test_margin_keeps_the_leading_shape():
    ids, margin = nearest_token_with_margin(random(2, 3, 12), random(50, 12, seed=1))
    assert ids.shape == margin.shape == (2, 3)
    assert nearest_token_with_margin(random(0, 12), random(50, 12))[1].shape == (0,)


def test_margins_of_a_table_that_8_bits_cannot_tell_apart(with_margin):
    e = random(1, 24) + 1e-3 * random(4500, 24, seed=1)
    x = e[::900] + 1e-4 * random(5, 24, seed=2)
    ids, margin = with_margin(x, e)
    assert torch.equal(ids, reference.nearest_token(x, e))
    torch.testing.assert_close(margin.double(), reference.margin(x, e), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_rounded_exactly(dtype: torch.dtype):
    x, e = random(50, 48).to(dtype), random(333, 48, seed=1).to(dtype)
    for backend in available_backends():
        assert torch.equal(
            nearest_token(x, e, kernel_backend=backend), reference.nearest_token(x, e)
        )


def test_autocast_and_reduced_matmul_precision_do_not_change_ids():
    x, e = random(200, 64), random(500, 64, seed=1)
    expected = reference.nearest_token(x, e)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(nearest_token(x, e, kernel_backend="torch"), expected)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_gradients_are_neither_needed_nor_made():
    x, e = random(3, 4).requires_grad_(), random(5, 4, seed=1).requires_grad_()
    assert not nearest_token(x, e).requires_grad


@pytest.mark.parametrize(
    ("x", "e", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(5, 4), r"x must have shape \[\.\.\., 4\].*\(2, 3\)"),
        (torch.zeros(()), torch.zeros(5, 4), "x must have shape"),
        (torch.zeros(2, 4), torch.zeros(0, 4), "embedding must have shape"),
        (torch.zeros(2, 0), torch.zeros(5, 0), "embedding must have shape"),
        (torch.zeros(2, 4), torch.zeros(4), "embedding must have shape"),
        (torch.zeros(2, 4).double(), torch.zeros(5, 4), "x must be float32"),
        (torch.zeros(2, 4), torch.zeros(5, 4).long(), "embedding must be float32"),
        (torch.zeros(2, 4, device="meta"), torch.zeros(5, 4), "one device"),
    ],
)
def test_refusals_name_the_argument(x: Tensor, e: Tensor, message: str):
    with pytest.raises(UsageError, match=message):
        nearest_token(x, e)


def test_forcing_the_native_backend_without_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "why_missing", lambda: "it was left out")
    x, e = random(2, 3), random(4, 3)
    assert nearest_token(x, e).shape == (2,)
    with (
        dispatch.force_backend("cpp"),
        pytest.raises(BackendUnavailableError, match=r"it was left out.*Available here: .*torch"),
    ):
        nearest_token(x, e)


@pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")
@pytest.mark.parametrize("wrap", [lambda e: e, Vocabulary], ids=["tensor", "vocabulary"])
@pytest.mark.parametrize(("width", "threads"), [(2**20 + 1, 1), (4, 1025)])
def test_beyond_the_native_limits_auto_takes_torch(
    width: int, threads: int, wrap: Callable, monkeypatch: pytest.MonkeyPatch
):
    e, x = random(3, width), random(2, width, seed=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(nearest_token(x, wrap(e)), reference.nearest_token(x, e))
    nearest_token_with_margin(x, wrap(e))
    with pytest.raises(BackendUnavailableError, match="it takes at most"):
        nearest_token(x, wrap(e), kernel_backend="cpp")


@pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x must be a tensor that DLPack's C interface reads, got NoneType"),
        ({"x": torch.zeros(2, 4).numpy()}, "x must be a tensor that DLPack.*got numpy.ndarray"),
        ({"x": torch.zeros(2, 4, device="meta")}, "x cannot be read: .*on meta$"),
        ({"x": torch.eye(4)[:2].to_sparse()}, "x cannot be read: "),
        ({"x": torch.zeros(2, 4).half()}, "x must be float32, got DLPack type 2 of 16 bits"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "x must be float32"),
        ({"x": torch.zeros(2, 4, dtype=torch.complex64)}, "x must be float32"),
        ({"x": torch.zeros(8)}, r"x must have 2 dimension\(s\), got 1"),
        ({"x": torch.zeros(2, 5)}, r"x must be \[2, 4\], got \[2, 5\]"),
        ({"x": torch.zeros(4, 2).t()}, "x must have contiguous rows"),
        ({"x": unaligned(2, 4)}, "x is not aligned to 4 bytes"),
        ({"embedding": torch.zeros(0, 4)}, "v must lie in"),
        ({"embedding": torch.zeros(5, 0)}, "d must lie in"),
        ({"embedding": torch.zeros(4, 5).t()}, "embedding must have contiguous rows"),
        ({"ids": torch.zeros(2)}, "ids must be int64"),
        ({"ids": torch.zeros(3).long()}, r"ids must be \[2\], got \[3\]"),
        ({"ids": torch.zeros(4).long()[::2]}, "ids must be contiguous"),
        ({"margins": torch.zeros(1)}, r"margins must be \[2\], got \[1\]"),
        ({"margins": torch.zeros(1).expand(2)}, "margins must be contiguous"),
        ({"margins": torch.zeros(2).double()}, "margins must be float32"),
        ({"packed": torch.zeros(64).byte()}, r"packed must be \["),
        ({"packed": torch.zeros(64)}, "packed must be bool or uint8"),
        ({"threads": 0}, "threads must lie in"),
        ({"threads": 1025}, "threads must lie in"),
        ({"path": "mmx"}, "no path 'mmx'"),
    ],
)
def test_the_native_side_refuses_what_it_cannot_read(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        native.module().nearest_token(**{**native_arguments(), **change})


@pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")
def test_the_native_side_refuses_outputs_that_lie_in_its_inputs():
    memory = torch.zeros(64)
    given = native_arguments()
    x, ids, margins = memory[:8].view(2, 4), memory[8:12].view(torch.int64), memory[12:14]
    native.module().nearest_token(**{**given, "x": x, "ids": ids, "margins": margins})
    for change, names in (
        ({"ids": memory[4:8].view(torch.int64)}, "ids must not share memory with x"),
        ({"margins": memory[7:9]}, "margins must not share memory with x"),
        ({"margins": memory[11:13]}, "margins must not share memory with ids"),
        ({"embedding": memory[9:29].view(5, 4)}, "ids must not share memory with embedding"),
    ):
        with pytest.raises(ValueError, match=names):
            native.module().nearest_token(
                **{**given, "x": x, "ids": ids, "margins": margins, **change}
            )


@pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": None}, "packed must be a tensor"),
        ({"packed": torch.zeros(64).byte()}, r"packed must be \["),
        ({"packed": torch.zeros(64)}, "packed must be bool or uint8"),
        ({"embedding": torch.zeros(0, 4)}, "v must lie in"),
        ({"embedding": torch.zeros(5, 0)}, "d must lie in"),
        ({"embedding": torch.zeros(4, 5).t()}, "contiguous rows"),
        ({"threads": 0}, "threads must lie in"),
        ({"path": "mmx"}, "no path 'mmx'"),
    ],
)
def test_packing_refuses_what_it_cannot_read(change: dict, message: str):
    size = native.module().packed_bytes(5, 4, "portable")
    arguments = {
        "embedding": random(5, 4),
        "packed": torch.empty(size, dtype=torch.uint8),
        "threads": 1,
        "path": "portable",
    }
    native.module().pack_vocabulary(**arguments)
    with pytest.raises(ValueError, match=message):
        native.module().pack_vocabulary(**{**arguments, **change})
    shifted = torch.empty(size + 32, dtype=torch.uint8)[32:]
    with pytest.raises(ValueError, match="packed is not aligned to 64 bytes"):
        native.module().pack_vocabulary(**{**arguments, "packed": shifted})


@pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")
@pytest.mark.parametrize("path", native.cpu_paths())
def test_a_packed_table_serves_no_other_table_and_no_other_layout(path: str):
    def packed(rows: int, width: int, path: str) -> Tensor:
        size = native.module().packed_bytes(rows, width, path)
        out = torch.zeros(size, dtype=torch.uint8)
        native.module().pack_vocabulary(random(rows, width), out, 1, path)
        return out

    given = {**native_arguments(), "path": path}
    native.module().nearest_token(**given, packed=packed(5, 4, path))
    # Of the same size: a panel has room for 64 rows, 8-bit channels come in fours.
    right = packed(5, 4, path)
    for other in (packed(6, 4, path), torch.zeros_like(right)):
        with pytest.raises(ValueError, match="packed was made of another table"):
            native.module().nearest_token(**given, packed=other)
    for name, inside in (
        ("ids", right[:16].view(torch.int64)),
        ("margins", right[-8:].view(torch.float32)),
    ):
        with pytest.raises(ValueError, match=f"{name} must not share memory with packed"):
            native.module().nearest_token(**{**given, name: inside}, packed=right)


def native_arguments() -> dict:
    ids = torch.empty(2, dtype=torch.int64)
    return {"x": random(2, 4), "embedding": random(5, 4), "ids": ids, "threads": 1}


@pytest.mark.skipif("avx512_vnni" not in native.cpu_paths(), reason="this CPU has no VNNI")
def test_the_integer_path_refuses_a_table_that_is_not_packed():
    with pytest.raises(ValueError, match="needs a packed table"):
        search(random(2, 4), Vocabulary(random(5, 4), transient=True), False, "avx512_vnni")


@pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")
def test_the_number_of_threads_does_not_change_the_result():
    x, e = random(300, 24), random(200, 24, seed=1)
    vocabulary = Vocabulary(e)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(nearest_token(x, e, kernel_backend="cpp"))
            vocabulary.forget()
            results.append(nearest_token(x, vocabulary, kernel_backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)


def available_backends() -> list[str]:
    return ["torch", "cpp"] if native.is_available() else ["torch"]
