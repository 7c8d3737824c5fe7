"""The distillation loss on a GPU, in Triton (`op.py` has the formulas).

Up to `_WHOLE` numbers a sample is one program: it sums over the sample's tiles, then reads them
again, from cache, and writes scaled gradients. A larger one is summed in parts of `_TILES` tiles
whose sums another kernel adds in a fixed order. How a sample is split depends on its shape alone,
so its result does not depend, bit for bit, on the batch around it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlmone_fast.kernels.triton import support
from dlmone_fast.kernels.triton.support import Build, build

_TILE = 4096
_WARPS = 16
_WHOLE = 1 << 15
_TILES = 4
_PARTS_AT_ONCE = 128
_WIDTHS = (128, 32)


@triton.jit
def _targets(mask_ptr, sample, row, last, L):
    return (tl.load(mask_ptr + sample * L + row, mask=row < last, other=0) != 0) & (row < last)


@triton.jit
def _tile(
    x_ptr, teacher_ptr, score_ptr, sample, row, column, target, L, D, KEEP: tl.constexpr
):  # fmt: skip
    """Offsets of a tile, which of them are used, and x, x̂_φ and x̂_ψ there, 0 elsewhere."""
    offset = sample * L * D + (row * D)[:, None] + column[None, :]
    # Source positions are not loaded: nothing they hold can reach a result.
    used = target[:, None] & (column < D)[None, :]
    x = tl.load(x_ptr + offset, mask=used, other=0.0, eviction_policy=KEEP).to(tl.float32)
    teacher = tl.load(teacher_ptr + offset, mask=used, other=0.0, eviction_policy=KEEP).to(
        tl.float32
    )
    score = tl.load(score_ptr + offset, mask=used, other=0.0, eviction_policy=KEEP).to(tl.float32)
    return offset, used, x, teacher, score


@triton.jit
def _sums(
    x_ptr, teacher_ptr, score_ptr, mask_ptr, sample, first, last, L, D, kl, one_minus_mu,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums over rows first … last of |x - x̂_φ|, of the loss, and the number of targets."""
    distance = tl.zeros([ROWS, WIDTH], tl.float32)
    value = tl.zeros([ROWS, WIDTH], tl.float32)
    number = tl.zeros([ROWS], tl.int32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        target = _targets(mask_ptr, sample, row, last, L)
        number += target.to(tl.int32)
        for left in range(0, D, WIDTH):
            column = left + tl.arange(0, WIDTH)
            _, _, x, teacher, score = _tile(
                x_ptr, teacher_ptr, score_ptr, sample, row, column, target, L, D, ""
            )
            a = teacher - score
            distance += tl.abs(x - teacher)
            value += tl.where(kl != 0, -a * x, a * (one_minus_mu * a + (score - x)))
    return tl.sum(distance), tl.sum(value), tl.sum(number) * D


@triton.jit
def _finished(distance, value, number, h_ptr, has_h, factor, floor, sample):
    """Loss, weight and scale of a sample from its sums."""
    h = tl.load(h_ptr + sample, mask=has_h != 0, other=1.0)
    n = tl.maximum(number, 1).to(tl.float32)
    mean = distance / n
    # Not tl.maximum: a mean that is not a number must show.
    weight = tl.where(mean < floor, floor, mean)
    scale = tl.where(number > 0, factor * h / (weight * n), 0.0)
    return value * scale, weight, scale


@triton.jit
def _write_tile(
    x_ptr, teacher_ptr, score_ptr, mask_ptr, of_x_ptr, of_teacher_ptr, of_score_ptr,
    sample, row, column, L, D, one_minus_mu, scale, COUNT: tl.constexpr,
):  # fmt: skip
    target = _targets(mask_ptr, sample, row, L, L)
    offset, used, x, teacher, score = _tile(
        x_ptr, teacher_ptr, score_ptr, sample, row, column, target, L, D, "evict_first"
    )
    inside = (row < L)[:, None] & (column < D)[None, :]
    a = teacher - score
    # Zero also where the scale is not finite.
    of_x = tl.where(used, -scale * a, 0.0)
    tl.store(of_x_ptr + offset, of_x.to(of_x_ptr.dtype.element_ty), mask=inside)
    if COUNT == 3:
        of_teacher = tl.where(used, scale * (2 * one_minus_mu * a + (score - x)), 0.0)
        tl.store(of_teacher_ptr + offset, of_teacher.to(of_x_ptr.dtype.element_ty), mask=inside)
        of_score = -(of_x + of_teacher)
        tl.store(of_score_ptr + offset, of_score.to(of_x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["has_h", "kl"])
def distillation_whole(
    x_ptr, teacher_ptr, score_ptr, mask_ptr, h_ptr, has_h, factor,
    loss_ptr, weight_ptr, scale_ptr, of_x_ptr, of_teacher_ptr, of_score_ptr,
    L, D, kl, one_minus_mu, floor, COUNT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    distance, value, number = _sums(
        x_ptr, teacher_ptr, score_ptr, mask_ptr, sample, 0, L, L, D, kl, one_minus_mu, ROWS, WIDTH
    )
    loss, weight, scale = _finished(distance, value, number, h_ptr, has_h, factor, floor, sample)
    tl.store(loss_ptr + sample, loss)
    tl.store(weight_ptr + sample, weight)
    tl.store(scale_ptr + sample, scale)
    if COUNT > 0:
        # Backwards: what was read last is the likeliest to be in the cache.
        last = (L - 1) // ROWS * ROWS
        for start in range(0, L, ROWS):
            for left in range(0, D, WIDTH):
                _write_tile(
                    x_ptr, teacher_ptr, score_ptr, mask_ptr,
                    of_x_ptr, of_teacher_ptr, of_score_ptr, sample,
                    last - start + tl.arange(0, ROWS), left + tl.arange(0, WIDTH),
                    L, D, one_minus_mu, scale, COUNT,
                )  # fmt: skip


@triton.jit(do_not_specialize=["kl"])
def distillation_part(
    x_ptr, teacher_ptr, score_ptr, mask_ptr, sums_ptr, numbers_ptr,
    L, D, parts, rows_per_part, kl, one_minus_mu, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // parts
    first = (pid % parts).to(tl.int32) * rows_per_part
    last = tl.minimum(first + rows_per_part, L)
    distance, value, number = _sums(
        x_ptr,
        teacher_ptr,
        score_ptr,
        mask_ptr,
        sample,
        first,
        last,
        L,
        D,
        kl,
        one_minus_mu,
        ROWS,
        WIDTH,
    )
    tl.store(sums_ptr + 2 * pid, distance)
    tl.store(sums_ptr + 2 * pid + 1, value)
    tl.store(numbers_ptr + pid, number)


@triton.jit(do_not_specialize=["has_h"])
def distillation_total(
    sums_ptr, numbers_ptr, h_ptr, has_h, factor, loss_ptr, weight_ptr, scale_ptr,
    parts, floor, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    distance = tl.zeros([BLOCK], tl.float32)
    value = tl.zeros([BLOCK], tl.float32)
    number = tl.zeros([BLOCK], tl.int32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        there = sample * parts + part
        distance += tl.load(sums_ptr + 2 * there, mask=part < parts, other=0.0)
        value += tl.load(sums_ptr + 2 * there + 1, mask=part < parts, other=0.0)
        number += tl.load(numbers_ptr + there, mask=part < parts, other=0)
    loss, weight, scale = _finished(
        tl.sum(distance), tl.sum(value), tl.sum(number), h_ptr, has_h, factor, floor, sample
    )
    tl.store(loss_ptr + sample, loss)
    tl.store(weight_ptr + sample, weight)
    tl.store(scale_ptr + sample, scale)


@triton.jit(do_not_specialize=["upstream_stride", "skip_ones", "has_upstream"])
def distillation_gradients(
    x_ptr, teacher_ptr, score_ptr, mask_ptr, scale_ptr, upstream_ptr, upstream_stride,
    of_x_ptr, of_teacher_ptr, of_score_ptr, L, D, row_tiles, column_tiles, one_minus_mu, skip_ones,
    has_upstream, COUNT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    tiles = row_tiles * column_tiles
    sample = pid // tiles
    tile = (pid % tiles).to(tl.int32)
    factor = tl.load(upstream_ptr + sample * upstream_stride, mask=has_upstream != 0, other=1.0)
    if (skip_ones == 0) | (factor != 1.0):
        _write_tile(
            x_ptr, teacher_ptr, score_ptr, mask_ptr, of_x_ptr, of_teacher_ptr, of_score_ptr,
            sample, tile // column_tiles * ROWS + tl.arange(0, ROWS),
            tile % column_tiles * WIDTH + tl.arange(0, WIDTH),
            L, D, one_minus_mu, factor * tl.load(scale_ptr + sample), COUNT,
        )  # fmt: skip


def width(d: int) -> int:
    """Columns of a tile for an embedding of d channels: wide unless that idles more lanes."""
    wide, narrow = _WIDTHS
    return wide if triton.cdiv(d, wide) * wide == triton.cdiv(d, narrow) * narrow else narrow


def forward(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    multiplier: Tensor | None,
    factor: float,
    kl: bool,
    mu: float,
    floor: float,
    count: int,
) -> list[Tensor]:
    """loss, w, s, all fp32 [B], and the first `count` gradients of the summed loss."""
    inputs = _readable(x, x0_teacher, x0_score, mask)
    loss, weight, scale = (x.new_empty(len(x), dtype=torch.float32) for _ in range(3))
    made = _new(x, count)
    if not len(x):
        return [loss, weight, scale, *made]
    results = (loss, weight, scale)
    h = (loss if multiplier is None else multiplier.contiguous(), multiplier is not None, factor)
    with support.on_device(x):
        if x[0].numel() <= _WHOLE:
            distillation_whole[(len(x),)](
                *inputs, h[0], int(h[1]), h[2], *results, *_pointers(made, x),
                x.shape[1], x.shape[2], int(kl), 1 - mu, floor, COUNT=count, **_tile_of(x),
            )  # fmt: skip
        else:
            _in_parts(inputs, h, results, kl, mu, floor)
            _write(inputs, scale, None, mu, count, made, skip_ones=False)
    return [*results, *made]


def gradients(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    scale: Tensor,
    upstream: Tensor,
    mu: float,
    count: int,
    into: list[Tensor] | None = None,
) -> list[Tensor]:
    """The first `count` gradients times `upstream`: new, or `into` where the factor is not 1."""
    made = _new(x, count) if into is None else into
    inputs = _readable(x, x0_teacher, x0_score, mask)
    with support.on_device(x):
        _write(inputs, scale, upstream, mu, count, made, skip_ones=into is not None)
    return made


def _in_parts(
    inputs: tuple[Tensor, ...],
    h: tuple[Tensor, bool, float],
    results: tuple[Tensor, ...],
    kl: bool,
    mu: float,
    floor: float,
) -> None:
    x, tile = inputs[0], _tile_of(inputs[0])
    per_row = triton.cdiv(x.shape[2], tile["WIDTH"]) * tile["WIDTH"]
    rows_per_part = max(1, _TILES * _TILE // (per_row * tile["ROWS"])) * tile["ROWS"]
    parts = triton.cdiv(x.shape[1], rows_per_part)
    sums = x.new_empty(len(x), parts, 2, dtype=torch.float32)
    numbers = x.new_empty(len(x), parts, dtype=torch.int32)
    distillation_part[(len(x) * parts,)](
        *inputs, sums, numbers, x.shape[1], x.shape[2], parts, rows_per_part, int(kl), 1 - mu,
        **tile,
    )  # fmt: skip
    distillation_total[(len(x),)](
        sums, numbers, h[0], int(h[1]), h[2], *results, parts, floor,
        BLOCK=_PARTS_AT_ONCE, num_warps=1,
    )  # fmt: skip


def _write(
    inputs: tuple[Tensor, ...],
    scale: Tensor,
    upstream: Tensor | None,
    mu: float,
    count: int,
    made: list[Tensor],
    skip_ones: bool,
) -> None:
    x, tile = inputs[0], _tile_of(inputs[0])
    row_tiles = triton.cdiv(x.shape[1], tile["ROWS"])
    column_tiles = triton.cdiv(x.shape[2], tile["WIDTH"])
    programs = len(x) * row_tiles * column_tiles
    if not programs or not count:
        return
    has_upstream = upstream is not None
    upstream = scale if upstream is None else upstream
    distillation_gradients[(programs,)](
        *inputs, scale, upstream, upstream.stride(0), *_pointers(made, x), x.shape[1], x.shape[2],
        row_tiles, column_tiles, 1 - mu, int(skip_ones), int(has_upstream), COUNT=count, **tile,
    )  # fmt: skip


def _tile_of(x: Tensor) -> dict[str, int]:
    columns = width(x.shape[2])
    return {"ROWS": _TILE // columns, "WIDTH": columns, "num_warps": _WARPS}


def _readable(x: Tensor, x0_teacher: Tensor, x0_score: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    # int64 is what training has; one byte holds any other mask.
    flags = mask if mask.dtype == torch.int64 else (mask != 0).view(torch.uint8)
    return tuple(tensor.contiguous() for tensor in (x, x0_teacher, x0_score, flags))


def _new(x: Tensor, count: int) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(count)]


def _pointers(made: list[Tensor], x: Tensor) -> list[Tensor]:
    # A pointer that is never written through stands in for a gradient nobody wants.
    return [*made, *(x for _ in range(3 - len(made)))]


_ELEMENTS = ("x_ptr", "teacher_ptr", "score_ptr", "of_x_ptr", "of_teacher_ptr", "of_score_ptr")
_OTHERS = {**dict.fromkeys(("factor", "one_minus_mu", "floor"), "fp32"), "numbers_ptr": "*i32"}


def _build(kernel: Any, kind: str, mask: str, warps: int, constants: Mapping[str, int]) -> Build:
    types = {**dict.fromkeys(_ELEMENTS, kind), "mask_ptr": mask, **_OTHERS}
    return build(kernel, constants, types, num_warps=warps, multiples_of_16=("L", "D"))


def _shipped() -> tuple[Build, ...]:
    builds = [_build(distillation_total, "*fp32", "*u8", 1, {"BLOCK": _PARTS_AT_ONCE})]
    for kind, mask, columns in product(("*fp32", "*fp16", "*bf16"), ("*i64", "*u8"), _WIDTHS):
        tile = {"ROWS": _TILE // columns, "WIDTH": columns}
        common = (kind, mask, _WARPS)
        builds.append(_build(distillation_part, *common, tile))
        builds += [_build(distillation_whole, *common, {"COUNT": n, **tile}) for n in (0, 1, 3)]
        builds += [_build(distillation_gradients, *common, {"COUNT": n, **tile}) for n in (1, 3)]
    return tuple(builds)


SHIPPED: tuple[Build, ...] = _shipped()
