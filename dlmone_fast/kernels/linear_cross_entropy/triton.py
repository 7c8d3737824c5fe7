"""Linear cross-entropy on a GPU: the logits exist one tile at a time, in registers.

The selected positions are listed first on the device, by a stable sort, and kernels read their
number from memory: programs beyond it return, loops end there. So positions that are not selected
cost nothing, the host waits for nothing, and a CUDA graph replays with another mask.

* forward: token tiles x splits of the vocabulary, each with a running maximum and sum; a second
  kernel merges the splits in their order.
* gradient of h: token tiles x channel tiles x splits of the vocabulary, every logits tile again.
* gradients of E and b: word tiles x channel tiles x splits of the tokens.

Splits write partial results that are added up in a fixed order: no atomics, the same bits every
time. A channel tile is at most 256 wide (the sum must fit in registers), so that d > 256 makes
the logits once per channel tile.

Memory beside the arguments and the results, for N positions, with S the splits of `_splits`:
    forward   8 S N + 8 N bytes, kept for the backward pass 12 N, and at most 32 N for the sort
    backward  4 d (S_h N + S_v V) + 4 S_v V bytes, and 16 N bytes
where S is at most 16, and at most 1 once there are 256 tiles of 64 tokens or 64 words.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlmone_fast.kernels.linear_cross_entropy.torch import check_targets, rows_of, take
from dlmone_fast.kernels.triton import support
from dlmone_fast.kernels.triton.support import Build, build

# Enough programs for every multiprocessor of a large GPU twice over; no property of the GPU at
# hand enters, so that results are the same on each.
_PROGRAMS = 256
_MOST_SPLITS = 16
_WIDEST_CHANNEL_TILE = 256
_MERGE_BLOCK = 256

_TILE = 64
_TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def _logits_tile(  # type: ignore[no-untyped-def]
    h_ptr, e_ptr, bias_ptr, rows, row_ok, words, word_ok, D, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    z = tl.zeros((TOKENS, WORDS), tl.float32)
    for first in range(0, D, DEPTH):
        k = first + tl.arange(0, DEPTH)
        k_ok = k < D
        h = tl.load(h_ptr + rows[:, None] * D + k[None, :],
                    mask=row_ok[:, None] & k_ok[None, :], other=0.0)  # fmt: skip
        e = tl.load(e_ptr + words[None, :] * D + k[:, None],
                    mask=word_ok[None, :] & k_ok[:, None], other=0.0)  # fmt: skip
        if UPCAST:
            h, e = h.to(tl.float32), e.to(tl.float32)
        z = tl.dot(h, e, z, input_precision=PRECISION)
    return z + tl.load(bias_ptr + words, mask=word_ok, other=0.0)[None, :]


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    h_ptr, e_ptr, bias_ptr, targets_ptr, rows_ptr, count_ptr,
    highest_ptr, sum_ptr, target_ptr, N, V, D, words_per_split,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * TOKENS
    split = tl.program_id(1).to(tl.int64)
    count = tl.load(count_ptr)
    if start >= count:
        return
    place = start + tl.arange(0, TOKENS)
    ok = place < count
    rows = tl.load(rows_ptr + place, mask=ok, other=0).to(tl.int64)
    targets = tl.load(targets_ptr + rows, mask=ok, other=-1)
    # Finite, so that a tile of words that are all ruled out (bias -inf) adds 0 and not NaN.
    highest = tl.full((TOKENS,), -3.4e38, tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    target = tl.zeros((TOKENS,), tl.float32)
    low = split * words_per_split
    high = tl.minimum(low + words_per_split, V)
    for first in range(low, high, WORDS):
        words = first + tl.arange(0, WORDS).to(tl.int64)
        word_ok = words < high
        z = _logits_tile(h_ptr, e_ptr, bias_ptr, rows, ok, words, word_ok, D,
                         UPCAST, PRECISION, TOKENS, WORDS, DEPTH)  # fmt: skip
        target += tl.sum(tl.where(words[None, :] == targets[:, None], z, 0.0), axis=1)
        z = tl.where(word_ok[None, :], z, -float("inf"))
        new = tl.maximum(highest, tl.max(z, axis=1))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(z - new[:, None]), axis=1)
        highest = new
    tl.store(highest_ptr + split * N + place, highest, mask=ok)
    tl.store(sum_ptr + split * N + place, total, mask=ok)
    tl.store(target_ptr + place, target, mask=ok & (targets >= low) & (targets < high))


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    highest_ptr, sum_ptr, target_ptr, rows_ptr, count_ptr, losses_ptr, statistics_ptr, N,
    splits, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = place < tl.load(count_ptr)
    rows = tl.load(rows_ptr + place, mask=ok, other=0).to(tl.int64)
    wide = place.to(tl.int64)
    highest = tl.load(highest_ptr + wide, mask=ok, other=0.0)
    for split in range(1, splits):
        highest = tl.maximum(highest, tl.load(highest_ptr + split * N + wide, mask=ok, other=0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        part = tl.load(highest_ptr + split * N + wide, mask=ok, other=0.0)
        total += tl.load(sum_ptr + split * N + wide, mask=ok, other=1.0) * tl.exp(part - highest)
    # The difference first: logits may be much larger than the loss.
    target = tl.load(target_ptr + wide, mask=ok, other=0.0)
    tl.store(losses_ptr + rows, (highest - target) + tl.log(total), mask=ok)
    tl.store(statistics_ptr + wide, highest, mask=ok)
    tl.store(statistics_ptr + N + wide, total, mask=ok)


@triton.jit
def _residual_tile(z, m, s, targets, words, row_ok, word_ok):  # type: ignore[no-untyped-def]
    # 1024 (p - [v = y]), 0 outside: the power of two keeps small p out of fp16's subnormals.
    z = tl.where(row_ok[:, None] & word_ok[None, :], z - m[:, None], -float("inf"))
    p = tl.exp(z) / s[:, None]
    return 1024.0 * tl.where(words[None, :] == targets[:, None], p - 1.0, p)


@triton.jit
def _h_gradient_kernel(  # type: ignore[no-untyped-def]
    h_ptr, e_ptr, bias_ptr, targets_ptr, rows_ptr, count_ptr, statistics_ptr, gradient_ptr,
    out_ptr, N, V, D, words_per_split,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
    WORDS: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * TOKENS
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(2).to(tl.int64)
    count = tl.load(count_ptr)
    if start >= count:
        return
    place = start + tl.arange(0, TOKENS)
    ok = place < count
    rows = tl.load(rows_ptr + place, mask=ok, other=0).to(tl.int64)
    targets = tl.load(targets_ptr + rows, mask=ok, other=-1)
    m = tl.load(statistics_ptr + place, mask=ok, other=0.0)
    s = tl.load(statistics_ptr + N + place, mask=ok, other=1.0)
    channel_ok = channels < D
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    low = split * words_per_split
    high = tl.minimum(low + words_per_split, V)
    for first in range(low, high, WORDS):
        words = first + tl.arange(0, WORDS).to(tl.int64)
        word_ok = words < high
        z = _logits_tile(h_ptr, e_ptr, bias_ptr, rows, ok, words, word_ok, D,
                         UPCAST, PRECISION, TOKENS, WORDS, DEPTH)  # fmt: skip
        p = _residual_tile(z, m, s, targets, words, ok, word_ok)
        e = tl.load(e_ptr + words[:, None] * D + channels[None, :],
                    mask=word_ok[:, None] & channel_ok[None, :], other=0.0)  # fmt: skip
        if UPCAST:
            e = e.to(tl.float32)
        total = tl.dot(p.to(e.dtype), e, total, input_precision=PRECISION)
    gradient = tl.load(gradient_ptr + rows, mask=ok, other=0.0)
    total *= (gradient / 1024.0)[:, None]
    tl.store(out_ptr + (split * N + rows[:, None]) * D + channels[None, :],
             total, mask=ok[:, None] & channel_ok[None, :])  # fmt: skip


@triton.jit
def _table_gradient_kernel(  # type: ignore[no-untyped-def]
    h_ptr, e_ptr, bias_ptr, targets_ptr, rows_ptr, count_ptr, statistics_ptr, gradient_ptr,
    size_ptr, out_ptr, bias_out_ptr, N, V, D, tokens_per_split,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
    WORDS: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    words = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(2).to(tl.int64)
    word_ok = words < V
    channel_ok = channels < D
    # Gradients of one loss may be tiny: relative to the largest they fit into 16 bits.
    size = tl.load(size_ptr)
    size = tl.where(size == 0.0, 1.0, size)
    total = tl.zeros((WORDS, CHANNELS), tl.float32)
    bias_total = tl.zeros((WORDS,), tl.float32)
    low = split * tokens_per_split
    high = tl.minimum(low + tokens_per_split, tl.load(count_ptr).to(tl.int64))
    for first in range(low, high, TOKENS):
        place = first + tl.arange(0, TOKENS).to(tl.int64)
        ok = place < high
        rows = tl.load(rows_ptr + place, mask=ok, other=0).to(tl.int64)
        targets = tl.load(targets_ptr + rows, mask=ok, other=-1)
        m = tl.load(statistics_ptr + place, mask=ok, other=0.0)
        s = tl.load(statistics_ptr + N + place, mask=ok, other=1.0)
        gradient = tl.load(gradient_ptr + rows, mask=ok, other=0.0) / size
        z = _logits_tile(h_ptr, e_ptr, bias_ptr, rows, ok, words, word_ok, D,
                         UPCAST, PRECISION, TOKENS, WORDS, DEPTH)  # fmt: skip
        p = _residual_tile(z, m, s, targets, words, ok, word_ok) * gradient[:, None]
        bias_total += tl.sum(p, axis=0)
        h = tl.load(h_ptr + rows[:, None] * D + channels[None, :],
                    mask=ok[:, None] & channel_ok[None, :], other=0.0)  # fmt: skip
        if UPCAST:
            h = h.to(tl.float32)
        total = tl.dot(tl.trans(p).to(h.dtype), h, total, input_precision=PRECISION)
    scale = size / 1024.0
    tl.store(out_ptr + (split * V + words[:, None]) * D + channels[None, :],
             total * scale, mask=word_ok[:, None] & channel_ok[None, :])  # fmt: skip
    if tl.program_id(1) == 0:
        tl.store(bias_out_ptr + split * V + words, bias_total * scale, mask=word_ok)


def forward(
    h: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    selected: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], (m, s) of the selected positions in order [2, N], and those positions."""
    n, v = len(h), len(embedding)
    if targets.device.type == "cpu":
        # In the interpreter; on a GPU, looking at a value would make the host wait.
        check_targets(take(targets, rows_of(selected)), v)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": h.device}
    losses, statistics = torch.zeros(n, **fp32), torch.zeros(2, n, **fp32)
    rows = _selected_rows(h, selected)
    if n == 0:
        return losses, statistics, rows
    tile = _forward_tile(h.dtype)
    tiles = triton.cdiv(n, tile["TOKENS"])
    splits, words_per_split = _splits(tiles, v, tile["WORDS"])
    partial, target = torch.empty(2, splits, n, **fp32), torch.empty(n, **fp32)
    operands = _operands(h, embedding, bias, targets, rows)
    with support.on_device(h):
        _forward_kernel[tiles, splits](
            *operands, partial[0], partial[1], target, n, v, h.shape[1], words_per_split,
            **_constants(h.dtype), **tile, **_launch(h.dtype, "forward"))  # fmt: skip
        _merge_kernel[(triton.cdiv(n, _MERGE_BLOCK),)](
            partial[0], partial[1], target, *operands[-2:], losses, statistics, n, splits,
            BLOCK=_MERGE_BLOCK)  # fmt: skip
    return losses, statistics, rows


def backward(
    gradient: Tensor,
    h: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    selected: Tensor | None,
    statistics: Tensor,
    rows: Tensor,
    want_h: bool,
    want_embedding: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """fp32 gradients of h, embedding and bias; None for those that are not wanted."""
    if selected is not None:
        gradient = gradient.where(selected, 0.0)
    shared = (*_operands(h, embedding, bias, targets, rows), statistics, gradient.contiguous())
    dh = _h_gradient(h, embedding, shared, selected is not None) if want_h else None
    if not (want_embedding or want_bias):
        return dh, None, None
    de, db = _table_gradient(h, embedding, shared)
    return dh, de if want_embedding else None, db if want_bias else None


def _h_gradient(
    h: Tensor, embedding: Tensor, shared: tuple[Tensor, ...], incomplete: bool
) -> Tensor:
    (n, d), v = h.shape, len(embedding)
    tile = _backward_tile(h.dtype, d)
    grid = triton.cdiv(n, tile["TOKENS"]), triton.cdiv(d, tile["CHANNELS"])
    splits, words_per_split = _splits(max(1, grid[0] * grid[1]), v, tile["WORDS"])
    make = torch.zeros if incomplete else torch.empty
    partial = make(splits, n, d, dtype=torch.float32, device=h.device)
    if n:
        with support.on_device(h):
            _h_gradient_kernel[*grid, splits](
                *shared, partial, n, v, d, words_per_split,
                **_constants(h.dtype), **tile, **_launch(h.dtype, "backward"))  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0)


def _table_gradient(
    h: Tensor, embedding: Tensor, shared: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    (n, d), v = h.shape, len(embedding)
    tile = _backward_tile(h.dtype, d)
    grid = triton.cdiv(v, tile["WORDS"]), triton.cdiv(d, tile["CHANNELS"])
    splits, tokens_per_split = _splits(grid[0] * grid[1], max(1, n), tile["TOKENS"])
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": h.device}
    if n == 0:
        return torch.zeros(v, d, **fp32), torch.zeros(v, **fp32)
    partial, bias_partial = torch.empty(splits, v, d, **fp32), torch.empty(splits, v, **fp32)
    largest = shared[-1].abs().amax()
    with support.on_device(h):
        _table_gradient_kernel[*grid, splits](
            *shared, largest, partial, bias_partial, n, v, d, tokens_per_split,
            **_constants(h.dtype), **tile, **_launch(h.dtype, "backward"))  # fmt: skip
    if splits == 1:
        return partial[0], bias_partial[0]
    return partial.sum(0), bias_partial.sum(0)


def _selected_rows(h: Tensor, selected: Tensor | None) -> Tensor:
    """int32 [N + 1]: the selected positions in order, the others, and the number selected."""
    n = len(h)
    if selected is None:
        return torch.arange(n + 1, dtype=torch.int32, device=h.device)
    rows = torch.empty(n + 1, dtype=torch.int32, device=h.device)
    # A sort by a key of one bit: without the host's help, and the same order every time.
    rows[:n] = selected.logical_not().to(torch.uint8).argsort(stable=True)
    rows[n] = selected.sum()
    return rows


def _operands(
    h: Tensor, embedding: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor
) -> tuple[Tensor, ...]:
    if bias is None:
        bias = torch.zeros(len(embedding), dtype=torch.float32, device=h.device)
    tensors = (h, embedding, bias.float(), targets)
    return (*(t.contiguous() for t in tensors), rows[:-1], rows[-1:])


def _splits(tiles: int, length: int, tile: int) -> tuple[int, int]:
    """How many parts a loop over `length` is cut into, and the length of a part."""
    steps = triton.cdiv(length, tile)
    splits = max(1, min(_MOST_SPLITS, _PROGRAMS // tiles, steps))
    return splits, triton.cdiv(steps, splits) * tile


def _forward_tile(dtype: torch.dtype) -> dict[str, int]:
    depth = 32 if dtype == torch.float32 else 64
    return {"TOKENS": _TILE, "WORDS": _TILE, "DEPTH": depth}


def _backward_tile(dtype: torch.dtype, d: int) -> dict[str, int]:
    # tf32x3 holds both halves of each operand in registers, and 256 channels fill them: half tiles.
    fp32 = dtype == torch.float32
    channels = min(128 if fp32 else _WIDEST_CHANNEL_TILE, max(64, triton.next_power_of_2(d)))
    depth = 32 if fp32 else 64
    return {
        "TOKENS": _TILE // 2 if fp32 or channels > 128 else _TILE,
        "WORDS": _TILE,
        "DEPTH": depth,
        "CHANNELS": channels,
    }


def _constants(dtype: torch.dtype) -> dict[str, Any]:
    upcast = dtype != torch.float32 and support.interpreting()
    return {"UPCAST": upcast, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}


def _launch(dtype: torch.dtype, direction: str) -> dict[str, Any]:
    stages = 3 if direction == "forward" and dtype != torch.float32 else 2
    return {"num_warps": 8, "num_stages": stages}


_INTEGERS = {"targets_ptr": "*i64", "rows_ptr": "*i32", "count_ptr": "*i32"}


def _build(kernel: Any, dtype: torch.dtype, tile: dict[str, int], direction: str) -> Build:
    element = "*" + _TRITON_TYPES[dtype]
    constants = {**_constants(dtype), **tile, "UPCAST": False}
    aligned = tuple(n for n in kernel.arg_names if n == "D" or n.endswith("_per_split"))
    types = {"h_ptr": element, "e_ptr": element, **_INTEGERS}
    return build(kernel, constants, types, multiples_of_16=aligned, **_launch(dtype, direction))


def _shipped() -> tuple[Build, ...]:
    builds = [_build(_forward_kernel, t, _forward_tile(t), "forward") for t in _TRITON_TYPES]
    for dtype in _TRITON_TYPES:
        tiles = {str(tile): tile for d in (64, 128, 256)
                 for tile in [_backward_tile(dtype, d)]}  # fmt: skip
        for tile in tiles.values():
            builds.append(_build(_h_gradient_kernel, dtype, tile, "backward"))
            builds.append(_build(_table_gradient_kernel, dtype, tile, "backward"))
    return (*builds, build(_merge_kernel, {"BLOCK": _MERGE_BLOCK}, _INTEGERS))


SHIPPED = _shipped()
