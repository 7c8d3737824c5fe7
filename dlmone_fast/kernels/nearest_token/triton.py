"""Nearest-token rounding on a GPU: a 16-bit search on tensor cores, decided in fp64.

Two kernels. `_search_kernel` shares the vocabulary out in splits and keeps, for every token and
split, the lowest score half_norm(v) - <x, e_v>, its id and the second-lowest score: nothing of
size tokens x vocabulary exists. `_decide_kernel` knows how far a score can be off: where another
one lies within twice that of the lowest, it measures the rows of every split that comes as near,
in fp64 from the original numbers and in the order of `reference.py`.

A launch needs no answer from the GPU, so both kernels can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlmone_fast.kernels.nearest_token.vocabulary import Vocabulary
from dlmone_fast.kernels.triton import support
from dlmone_fast.kernels.triton.support import Build, build

# Rows of the vocabulary scored together; a power of two, whose column numbers replace the lowest
# bits of a score.
_ROWS = 128
# Widths up to the first are multiplied in one go, larger ones in chunks of the second.
_WIDEST = 128
_CHUNK = 64
# Row strides beyond this are made contiguous: offsets within a tile are 32-bit numbers.
_LARGEST_STRIDE = 1 << 22
# Score of a row that can never win. Finite, since an infinity with a column number is NaN.
_NEVER = 3.0e38
# Two programs for each of the 132 multiprocessors of an H100.
_PROGRAMS = 264
# Splits are also what is measured again for an unclear token: not too large.
_FEWEST_SPLITS = 8
# With margins every token measures two splits or more.
_MARGIN_SPLITS = 64
_MARGIN_TOKENS = 1024
# fp64 numbers that a program of `_decide_kernel` measures at once.
_ELEMENTS = 2048
_TINY = 2.0**-120


@triton.jit
def _search_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_stride, n, table_ptr, half_ptr, lowest_ptr, id_ptr, second_ptr, tiles, tiles_per_split,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, NEVER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first_token = tl.program_id(0).to(tl.int64) * TOKENS
    split = tl.program_id(1).to(tl.int64)
    rows_of_tile = tl.arange(0, TOKENS)
    tokens = first_token + rows_of_tile
    there = tokens < n
    channels = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, ROWS)
    x_tile = x_ptr + first_token * x_stride
    x_offsets = rows_of_tile[:, None] * x_stride + channels[None, :]
    e_offsets = columns[:, None] * (CHUNKS * BLOCK_D) + channels[None, :]
    if CHUNKS == 1:
        x = tl.load(x_tile + x_offsets, mask=there[:, None] & (channels < D)[None, :], other=0.0)
        x = x.to(table_ptr.dtype.element_ty)
        if UPCAST:
            x = x.to(tl.float32)
    lowest = tl.full((TOKENS,), NEVER, tl.float32)
    second = tl.full((TOKENS,), NEVER, tl.float32)
    best = tl.zeros((TOKENS,), tl.int32)
    first = tl.program_id(1) * tiles_per_split
    e_tile = table_ptr + split * tiles_per_split * (ROWS * CHUNKS * BLOCK_D)
    half_tile = half_ptr + split * tiles_per_split * ROWS
    for tile in range(first, tl.minimum(first + tiles_per_split, tiles)):
        if CHUNKS == 1:
            e = tl.load(e_tile + e_offsets)
            if UPCAST:
                dot = tl.dot(x, tl.trans(e.to(tl.float32)), input_precision="ieee")
            else:
                dot = tl.dot(x, tl.trans(e))
        else:
            dot = tl.zeros((TOKENS, ROWS), tl.float32)
            for chunk in range(CHUNKS):
                inside = chunk * BLOCK_D + channels < D
                part = tl.load(
                    x_tile + chunk * BLOCK_D + x_offsets,
                    mask=there[:, None] & inside[None, :], other=0.0,
                ).to(table_ptr.dtype.element_ty)  # fmt: skip
                e = tl.load(e_tile + chunk * BLOCK_D + e_offsets)
                if UPCAST:
                    part = part.to(tl.float32)
                    dot += tl.dot(part, tl.trans(e.to(tl.float32)), input_precision="ieee")
                else:
                    dot = tl.dot(part, tl.trans(e), dot)
        scores = tl.load(half_tile + columns)[None, :] - dot
        e_tile += ROWS * CHUNKS * BLOCK_D
        half_tile += ROWS
        # The column in the lowest bits makes every key unique and finds the id for nothing.
        bits = (scores.to(tl.int32, bitcast=True) & -ROWS) | columns[None, :]
        keys = bits.to(tl.float32, bitcast=True)
        tile_lowest = tl.min(keys, 1)
        others = tl.where(keys == tile_lowest[:, None], NEVER, keys)
        second = tl.minimum(tl.maximum(lowest, tile_lowest), tl.minimum(second, tl.min(others, 1)))
        column = tile_lowest.to(tl.int32, bitcast=True) & (ROWS - 1)
        best = tl.where(tile_lowest < lowest, tile * ROWS + column, best)
        lowest = tl.minimum(lowest, tile_lowest)
    out = split * n + tokens
    tl.store(lowest_ptr + out, lowest, mask=there)
    tl.store(second_ptr + out, second, mask=there)
    tl.store(id_ptr + out, best, mask=there)


@triton.jit
def _decide_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_stride, n, e_ptr, e_row_stride, e_stride, table_ptr, extremes_ptr,
    lowest_ptr, id_ptr, second_ptr, ids_ptr, margin_ptr, v, splits, rows_per_split,
    D: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, MARGIN: tl.constexpr, NEVER: tl.constexpr, ROUNDINGS: tl.constexpr,
    FP64_ROUNDINGS: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    inside = channels < D
    stored = tl.load(x_ptr + token * x_stride + channels, mask=inside, other=0.0)
    x = stored.to(tl.float32)
    # What the search read in place of x.
    rounded = stored.to(table_ptr.dtype.element_ty).to(tl.float32).to(tl.float64)
    wide = x.to(tl.float64)
    norm = tl.sqrt(tl.sum(rounded * rounded, 0))
    lost = tl.sqrt(tl.sum((wide - rounded) * (wide - rounded), 0))
    half = tl.load(extremes_ptr).to(tl.float64)
    largest = tl.load(extremes_ptr + 1).to(tl.float64)
    table_lost = tl.load(extremes_ptr + 2).to(tl.float64)
    size = (norm + lost) * (largest + table_lost) + half
    error = lost * largest + norm * table_lost + ROUNDINGS * size + TINY
    # What rounding adds to half a distance in fp64: where that makes rows equally far, the lowest
    # id wins, and no score may say otherwise.
    error += ((norm + lost) * (norm + lost) + 2 * half) * FP64_ROUNDINGS
    # Written so that NaN counts as beyond fp32's range.
    error = tl.where(size < 1e37, error, float("inf"))

    parts = tl.arange(0, SPLITS)
    place = parts.to(tl.int64) * n + token
    lows = tl.load(lowest_ptr + place, mask=parts < splits, other=NEVER)
    seconds = tl.load(second_ptr + place, mask=parts < splits, other=NEVER)
    lowest = tl.min(lows, 0)
    part = tl.min(tl.where(lows == lowest, parts, SPLITS), 0)
    part = tl.minimum(part, splits - 1)
    second = tl.minimum(tl.min(seconds, 0), tl.min(tl.where(parts == part, NEVER, lows), 0))
    base = second if MARGIN else lowest
    limit = base.to(tl.float64) + 2 * error
    best = tl.load(id_ptr + part.to(tl.int64) * n + token).to(tl.int64)
    clear = second.to(tl.float64) > limit
    if MARGIN:
        clear = False
    if not clear:
        best = tl.full((), 0, tl.int64)
        nearest = tl.full((), float("inf"), tl.float64)
        next_nearest = tl.full((), float("inf"), tl.float64)
        offsets = tl.arange(0, ROWS)
        place_of_split = token
        for s in range(splits):
            low = tl.load(lowest_ptr + place_of_split).to(tl.float64)
            place_of_split += n
            # Negated, so that a limit that is not a number lets everything in.
            if not (low > limit):
                start = s * rows_per_split
                end = tl.minimum(start + rows_per_split, v)
                for first in range(start, end, ROWS):
                    rows = first + offsets
                    # Not into the next split, whose rows must not be measured twice.
                    valid = rows < end
                    e = tl.load(
                        e_ptr + rows.to(tl.int64)[:, None] * e_row_stride
                        + channels.to(tl.int64)[None, :] * e_stride,
                        mask=valid[:, None] & inside[None, :], other=0.0,
                    )  # fmt: skip
                    difference = wide[None, :] - e.to(tl.float32).to(tl.float64)
                    squares = difference * difference
                    # Halves folded onto each other, as the reference does.
                    for level in tl.static_range(LEVELS):
                        squares = tl.sum(tl.reshape(squares, (ROWS, 2, WIDTH >> (level + 1))), 1)
                    distances = tl.reshape(squares, (ROWS,))
                    # NaN compares false, and infinity never wins.
                    finite = valid & (distances < float("inf"))
                    distances = tl.where(finite, distances, float("inf"))
                    here = tl.min(distances, 0)
                    ids = tl.where(finite & (distances == here), rows, 2147483647)
                    id_here = tl.min(ids, 0)
                    rest = tl.min(tl.where(rows == id_here, float("inf"), distances), 0)
                    next_nearest = tl.minimum(
                        tl.maximum(nearest, here), tl.minimum(next_nearest, rest)
                    )
                    best = tl.where(here < nearest, id_here.to(tl.int64), best)
                    nearest = tl.minimum(nearest, here)
        if MARGIN:
            found = nearest < float("inf")
            margin = tl.where(found, next_nearest - nearest, 0.0)
            tl.store(margin_ptr + token, margin.to(tl.float32))
    tl.store(ids_ptr + token, best)


@dataclass(frozen=True)
class SearchTable:
    """A table as the search reads it.

    Attributes:
        rows: 16-bit [tiles * 128, padded d], zeros beyond the table and in rows that are not
            finite.
        half_norms: fp32 [tiles * 128], |e|^2 / 2; too large to win in those rows.
        extremes: fp32 [3], upper bounds over the finite rows: |e|^2 / 2, |e|, |e - rows|.
    """

    rows: Tensor
    half_norms: Tensor
    extremes: Tensor


def search_dtype(x: torch.dtype, table: torch.dtype) -> torch.dtype:
    """fp16 where both are, so that operands are exact; else bf16, which has fp32's range."""
    return torch.float16 if x == table == torch.float16 else torch.bfloat16


def padded_width(d: int) -> tuple[int, int]:
    """Channels in a chunk and the number of chunks."""
    if d <= _WIDEST:
        return max(16, triton.next_power_of_2(d)), 1
    return _CHUNK, triton.cdiv(d, _CHUNK)


def prepare(table: Tensor, dtype: torch.dtype) -> SearchTable:
    """The search's copy of E [V, d] in `dtype`."""
    v, d = table.shape
    block, chunks = padded_width(d)
    padded = triton.cdiv(v, _ROWS) * _ROWS
    exact = table.float()
    finite = exact.isfinite().all(1, keepdim=True)
    exact = torch.where(finite, exact, 0.0)
    rows = torch.zeros(padded, chunks * block, dtype=dtype, device=table.device)
    rows[:v, :d] = exact
    half_norms = torch.full((padded,), _NEVER, dtype=torch.float32, device=table.device)
    norms = torch.linalg.vector_norm(exact, dim=1, dtype=torch.float64)
    halves = norms.square().mul_(0.5)
    half_norms[:v] = torch.where(finite[:, 0], halves, _NEVER)
    difference = exact - rows[:v, :d].float()
    lost = torch.linalg.vector_norm(difference, dim=1, dtype=torch.float64)
    # A little more than their own rounding to fp32.
    extremes = torch.stack([halves.amax(), norms.amax(), lost.amax()]).mul_(1 + 2.0**-22).float()
    return SearchTable(rows, half_norms, extremes)


@dataclass(frozen=True)
class Plan:
    """How a number of tokens is shared out."""

    tokens: int
    splits: int
    tiles: int
    tiles_per_split: int

    @classmethod
    def of(cls, n: int, v: int, margin: bool) -> Plan:
        """A pure function of the sizes, the same on every device."""
        tokens = 128 if n > 64 else 64
        tiles = triton.cdiv(v, _ROWS)
        wanted = max(triton.cdiv(_PROGRAMS, triton.cdiv(n, tokens)), _FEWEST_SPLITS)
        if margin:
            wanted = max(wanted, _MARGIN_SPLITS)
        tiles_per_split = triton.cdiv(tiles, min(wanted, tiles))
        return cls(tokens, triton.cdiv(tiles, tiles_per_split), tiles, tiles_per_split)


def search(x: Tensor, vocabulary: Vocabulary, with_margin: bool) -> tuple[Tensor, Tensor | None]:
    """ids int64 [n] for rows x [n, d], and margins fp32 [n] if wanted."""
    ids = torch.empty(len(x), dtype=torch.int64, device=x.device)
    if not with_margin:
        if len(x):
            _launch(x, vocabulary, ids, None)
        return ids, None
    margin = torch.empty(len(x), dtype=torch.float32, device=x.device)
    for first in range(0, len(x), _MARGIN_TOKENS):
        part = slice(first, first + _MARGIN_TOKENS)
        _launch(x[part], vocabulary, ids[part], margin[part])
    return ids, margin


def _launch(x: Tensor, vocabulary: Vocabulary, ids: Tensor, margin: Tensor | None) -> None:
    table = vocabulary.table
    dtype = search_dtype(x.dtype, table.dtype)
    search = vocabulary.prepared(("triton", dtype), lambda made_of: prepare(made_of, dtype))
    if x.stride(1) != 1 or x.stride(0) > _LARGEST_STRIDE:
        x = x.contiguous()
    n, d = x.shape
    plan = Plan.of(n, len(table), margin is not None)
    lowest = torch.empty(plan.splits, n, dtype=torch.float32, device=x.device)
    second = torch.empty_like(lowest)
    best = torch.empty_like(lowest, dtype=torch.int32)
    constants, warps, stages = _search_configuration(d, plan.tokens, support.interpreting())
    # The interpreter's time goes by the number of steps, not by their size.
    elements = 32 * _ELEMENTS if support.interpreting() else _ELEMENTS
    decide = _decide_constants(d, plan.splits, margin is not None, elements)
    with support.on_device(x):
        _search_kernel[(triton.cdiv(n, plan.tokens), plan.splits)](
            x, x.stride(0), n, search.rows, search.half_norms, lowest, best, second, plan.tiles,
            plan.tiles_per_split, **constants, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        _decide_kernel[(n,)](
            x, x.stride(0), n, table, table.stride(0), table.stride(1), search.rows,
            search.extremes, lowest, best, second, ids, ids if margin is None else margin,
            len(table), plan.splits, plan.tiles_per_split * _ROWS, **decide, **_DECIDE_OPTIONS,
        )  # fmt: skip


# Contraction would make the fp64 distances differ from the reference's in the last bit.
# Left alone, the assembler spills a few bytes to fit a few programs more.
_DECIDE_OPTIONS = {"num_warps": 4, "num_stages": 1, "maxnreg": 168, "enable_fp_fusion": False}


def _search_configuration(
    d: int, tokens: int, upcast: bool
) -> tuple[dict[str, int | float | bool], int, int]:
    """Constants, warps and stages of `_search_kernel`."""
    block, chunks = padded_width(d)
    constants = {"D": d, "BLOCK_D": block, "CHUNKS": chunks, "TOKENS": tokens, "ROWS": _ROWS,
                 "NEVER": _NEVER, "UPCAST": upcast}  # fmt: skip
    return constants, (8 if tokens == 128 or chunks > 1 else 4), 3


def _decide_constants(
    d: int, splits: int, margin: bool, elements: int = _ELEMENTS
) -> dict[str, int | float | bool]:
    width = triton.next_power_of_2(d)
    # Truncating sums of d products, and the bits of a score that give way to its column.
    roundings = (d + 16) * 2.0**-22 + 1.01 * _ROWS * 2.0**-23
    return {"D": d, "WIDTH": width, "LEVELS": width.bit_length() - 1,
            "SPLITS": triton.next_power_of_2(splits), "ROWS": max(1, elements // width),
            "MARGIN": margin, "NEVER": _NEVER, "ROUNDINGS": roundings,
            "FP64_ROUNDINGS": 2.0**-48, "TINY": _TINY}  # fmt: skip


# Types of x, of the table and of its search copy; and the widths that are checked ahead of time.
_TYPES = (("bf16", "bf16", "bf16"), ("fp32", "fp32", "bf16"), ("fp16", "fp16", "fp16"))
_WIDTHS = (128, 64, 96, 256, 768)


def _builds() -> Iterator[Build]:
    for d in _WIDTHS:
        for x, table, search in _TYPES if d == _WIDTHS[0] else _TYPES[:2]:
            for tokens in (64, 128):
                yield _search_build(x, search, *_search_configuration(d, tokens, upcast=False))
            for margin in (False, True):
                splits = Plan.of(128, 30_522, margin).splits
                yield _decide_build(x, table, search, _decide_constants(d, splits, margin))


def _search_build(x: str, table: str, constants: dict, warps: int, stages: int) -> Build:
    types = {"x_ptr": f"*{x}", "table_ptr": f"*{table}", "id_ptr": "*i32"}
    multiples = ("x_stride",) if constants["D"] % 16 == 0 else ()
    return build(_search_kernel, constants, types, num_warps=warps, num_stages=stages,
                 multiples_of_16=multiples)  # fmt: skip


def _decide_build(x: str, table: str, search: str, constants: dict) -> Build:
    types = {"x_ptr": f"*{x}", "e_ptr": f"*{table}", "table_ptr": f"*{search}",
             "id_ptr": "*i32", "ids_ptr": "*i64",
             "margin_ptr": "*fp32" if constants["MARGIN"] else "*i64"}  # fmt: skip
    multiples = ("x_stride", "e_row_stride", "rows_per_split") if constants["D"] % 16 == 0 else ()
    options = {name: _DECIDE_OPTIONS[name] for name in ("maxnreg", "enable_fp_fusion")}
    return build(_decide_kernel, constants, types, num_warps=_DECIDE_OPTIONS["num_warps"],
                 num_stages=_DECIDE_OPTIONS["num_stages"], multiples_of_16=multiples,
                 options=options)  # fmt: skip


SHIPPED = tuple(_builds())
