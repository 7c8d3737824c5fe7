"""The fused blocks on a GPU, in Triton: a LayerNorm row stays in one program's registers."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlmone_fast.kernels.triton import support
from dlmone_fast.kernels.triton.support import Build, build

_NARROWEST = 32
_WIDEST = 4096
_NORM_TILE = 1024
_WIDTHS = (256, 32)
_TILE = 2048
_WARPS = 4


@triton.jit
def _normed(total, inside, weight, bias, eps, H):
    """LayerNorm of rows [ROWS, BLOCK] in fp32, with weight and bias [BLOCK]."""
    total = tl.where(inside, total, 0.0)
    centred = tl.where(inside, total - (tl.sum(total, 1) / H)[:, None], 0.0)
    # The first mean is off by its rounding, which a tiny eps would blow up in rows of (nearly)
    # equal values. The mean of what is left repairs it: exactly so if they are equal.
    centred = tl.where(inside, centred - (tl.sum(centred, 1) / H)[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / H
    return centred * (tl.rsqrt(variance + eps)[:, None] * weight[None, :]) + bias[None, :]


@triton.jit(do_not_specialize=["want_sum"])
def add_layer_norm_kernel(
    x_ptr, x_stride, residual_ptr, residual_stride, weight_ptr, bias_ptr, out_ptr, sum_ptr,
    rows, H, eps, want_sum, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < H)[None, :]
    place = (row * H)[:, None] + column[None, :]
    of_x = (row * x_stride)[:, None] + column[None, :]
    of_residual = (row * residual_stride)[:, None] + column[None, :]
    total = tl.load(x_ptr + of_x, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual_ptr + of_residual, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    if want_sum != 0:
        tl.store(sum_ptr + place, total.to(sum_ptr.dtype.element_ty), mask=inside)
    out = _normed(total, inside, weight, bias, eps, H)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def input_layer_norm_kernel(
    x_ptr, x_stride, position_ptr, position_stride, time_ptr, time_stride, weight_ptr, bias_ptr,
    out_ptr, rows, L, H, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < H)[None, :]
    of_x = (row * x_stride)[:, None] + column[None, :]
    of_position = (row % L * position_stride)[:, None] + column[None, :]
    of_time = (row // L * time_stride)[:, None] + column[None, :]
    total = tl.load(x_ptr + of_x, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(position_ptr + of_position, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(time_ptr + of_time, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    out = _normed(total, inside, weight, bias, eps, H)
    place = (row * H)[:, None] + column[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu(v):
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def _tanh(v):
    size = tl.abs(v)
    # Infinite from 44 on, which gives 1.
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    # There the difference cancels near 0. Least squares over [0, 0.625] of
    # (tanh(v) / v - 1) / v^2 as a polynomial in v^2: relative error of tanh below 2^-23.
    z = v * v
    p = -0.0058807446621358395 * z + 0.020806588232517242
    p = p * z - 0.05379476770758629
    p = p * z + 0.13332155346870422
    p = p * z - 0.3333331048488617
    near = v + v * (z * p)
    return tl.where(size < 0.625, near, tl.where(v < 0, -far, far))


@triton.jit
def bias_activation_kernel(
    x_ptr, x_stride, bias_ptr, out_ptr, rows, H, column_tiles,
    GELU: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row = pid // column_tiles * ROWS + tl.arange(0, ROWS)
    column = pid % column_tiles * WIDTH + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < H)[None, :]
    of_x = (row * x_stride)[:, None] + column[None, :]
    v = tl.load(x_ptr + of_x, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(bias_ptr + column, mask=column < H, other=0.0).to(tl.float32)[None, :]
    out = _gelu(v) if GELU else _tanh(v)
    place = (row * H)[:, None] + column[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


def norm_tile(hidden: int) -> dict[str, int]:
    """A power of two that holds a row, and as many rows as keep four warps busy."""
    block = max(_NARROWEST, triton.next_power_of_2(hidden))
    rows = max(1, _NORM_TILE // block)
    # Eight numbers a thread, whatever the width.
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(_WARPS, rows * block // 256)}


def activation_tile(hidden: int) -> dict[str, int]:
    """Wide tiles unless narrow ones idle fewer lanes."""
    wide, narrow = _WIDTHS
    fits = triton.cdiv(hidden, wide) * wide == triton.cdiv(hidden, narrow) * narrow
    columns = wide if fits else narrow
    return {"ROWS": _TILE // columns, "WIDTH": columns, "num_warps": _WARPS}


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, return_sum: bool
) -> tuple[Tensor, Tensor]:
    """The norm, and the sum (empty unless wanted)."""
    out = _new(x)
    total = _new(x) if return_sum else x.new_empty(0)
    rows, others = _rows(x), _rows(residual)
    if x.numel():
        tile = norm_tile(x.shape[-1])
        with support.on_device(x):
            add_layer_norm_kernel[(triton.cdiv(len(rows), tile["ROWS"]),)](
                rows, rows.stride(0), others, others.stride(0),
                weight.contiguous(), bias.contiguous(), out, total if return_sum else out,
                len(rows), x.shape[-1], eps, int(return_sum), **tile,
            )  # fmt: skip
    return out, total


def input_layer_norm(
    projected: Tensor, position: Tensor, time: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """The norm of the three-part sum."""
    out = _new(projected)
    rows, places, times = _rows(projected), _rows(position), _rows(time)
    if projected.numel():
        tile = norm_tile(projected.shape[-1])
        with support.on_device(projected):
            input_layer_norm_kernel[(triton.cdiv(len(rows), tile["ROWS"]),)](
                rows, rows.stride(0), places, places.stride(0), times, times.stride(0),
                weight.contiguous(), bias.contiguous(), out,
                len(rows), projected.shape[1], projected.shape[2], eps, **tile,
            )  # fmt: skip
    return out


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias)."""
    return _bias_activation(x, bias, gelu=True)


def bias_tanh(x: Tensor, bias: Tensor) -> Tensor:
    """tanh(x + bias)."""
    return _bias_activation(x, bias, gelu=False)


def _bias_activation(x: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    out, rows = _new(x), _rows(x)
    if x.numel():
        tile = activation_tile(x.shape[-1])
        column_tiles = triton.cdiv(x.shape[-1], tile["WIDTH"])
        programs = triton.cdiv(len(rows), tile["ROWS"]) * column_tiles
        with support.on_device(x):
            bias_activation_kernel[(programs,)](
                rows, rows.stride(0), bias.contiguous(), out, len(rows), x.shape[-1],
                column_tiles, GELU=gelu, **tile,
            )  # fmt: skip
    return out


def _new(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rows(x: Tensor) -> Tensor:
    """[rows, H] with adjacent channels: a view wherever the strides allow one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


_ELEMENTS = ("x_ptr", "residual_ptr", "time_ptr", "out_ptr", "sum_ptr")
_PARAMETERS = ("weight_ptr", "bias_ptr", "position_ptr")
_WHOLE_NUMBERS = ("x_stride", "residual_stride", "position_stride", "time_stride", "H")


def _build(kernel: Any, kind: str, parameters: str, tile: dict[str, int], **more: bool) -> Build:
    types = {
        **dict.fromkeys(_ELEMENTS, kind),
        **dict.fromkeys(_PARAMETERS, parameters),
        "eps": "fp32",
    }
    constants = {**{name: n for name, n in tile.items() if name != "num_warps"}, **more}
    aligned = tuple(name for name in _WHOLE_NUMBERS if name in kernel.arg_names)
    return build(kernel, constants, types, num_warps=tile["num_warps"], multiples_of_16=aligned)


def _shipped() -> tuple[Build, ...]:
    kinds = [("*fp32", "*fp32")]
    kinds += list(product(("*fp16",), ("*fp16", "*fp32")))
    kinds += list(product(("*bf16",), ("*bf16", "*fp32")))
    builds = []
    for kind, parameters in kinds:
        block = _NARROWEST
        while block <= _WIDEST:
            for kernel in (add_layer_norm_kernel, input_layer_norm_kernel):
                builds.append(_build(kernel, kind, parameters, norm_tile(block)))
            block *= 2
        for columns, gelu in product(_WIDTHS, (True, False)):
            tile = activation_tile(columns)
            builds.append(_build(bias_activation_kernel, kind, parameters, tile, GELU=gelu))
    return tuple(builds)


SHIPPED: tuple[Build, ...] = _shipped()
