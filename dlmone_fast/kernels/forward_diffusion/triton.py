"""x_t = alpha x_0 + sigma noise on a GPU, one read and one write: the noise is made on the way."""

# Triton gives kernels no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlmone_fast.kernels.noise.triton import (
    NARROW,
    NUM_WARPS,
    WIDE,
    Tiling,
    signed,
    tile_normals,
    tile_of_program,
    tile_place,
    tiling,
)
from dlmone_fast.kernels.triton import support
from dlmone_fast.kernels.triton.support import Build, build


@triton.jit(do_not_specialize=["stream"])
def _forward_diffusion_kernel(
    x0_ptr, ids_ptr, alpha_ptr, sigma_ptr, mask_ptr, draws_ptr, out_ptr,
    stream, length, channels, vocabulary, position_tiles, channel_tiles,
    GATHER: tl.constexpr, MASKED: tl.constexpr, POSITIONS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row, positions, blocks = tile_of_program(position_tiles, channel_tiles, POSITIONS, BLOCKS)
    offsets, channel, exists = tile_place(
        row, positions, blocks, length, channels, POSITIONS, BLOCKS
    )
    inside = positions < length
    if GATHER:
        ids = tl.load(ids_ptr + row * length + positions, mask=inside, other=0).to(tl.int64)
        known = (ids >= 0) & (ids < vocabulary)
        places = ids[:, None] * channels + channel[None, :]
        x0 = tl.load(x0_ptr + places, mask=exists & known[:, None], other=0.0).to(tl.float32)
        # Nobody checked the ids on the host: one outside of the table must not pass unseen.
        x0 = tl.where(known[:, None], x0, float("nan"))
    else:
        x0 = tl.load(x0_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    noise = tile_normals(draws_ptr, row, stream, positions, blocks, channels, POSITIONS, BLOCKS)
    x_t = tl.load(alpha_ptr + row) * x0 + tl.load(sigma_ptr + row) * noise
    if MASKED:
        target = tl.load(mask_ptr + row * length + positions, mask=inside, other=0) != 0
        x_t = tl.where(target[:, None], x_t, x0)
    tl.store(out_ptr + offsets, x_t.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _scale_targets_kernel(
    x_ptr, alpha_ptr, mask_ptr, out_ptr, length, channels, position_tiles, channel_tiles,
    MASKED: tl.constexpr, POSITIONS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row, positions, blocks = tile_of_program(position_tiles, channel_tiles, POSITIONS, BLOCKS)
    offsets, _, exists = tile_place(row, positions, blocks, length, channels, POSITIONS, BLOCKS)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    scaled = tl.load(alpha_ptr + row) * x
    if MASKED:
        inside = positions < length
        target = tl.load(mask_ptr + row * length + positions, mask=inside, other=0) != 0
        scaled = tl.where(target[:, None], scaled, x)
    tl.store(out_ptr + offsets, scaled.to(out_ptr.dtype.element_ty), mask=exists)


def forward_diffusion(
    source: Tensor,
    ids: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    mask: Tensor | None,
    draws: Tensor,
    stream: int,
) -> Tensor:
    """x_t [B, L, d] from x_0 [B, L, d], or from a table [V, d] and int64 ids [B, L]."""
    rows, length = source.shape[:2] if ids is None else ids.shape
    channels = source.shape[-1]
    out = torch.empty(rows, length, channels, dtype=source.dtype, device=source.device)
    draws = draws.contiguous()
    tiles = tiling(channels)
    programs, position_tiles, channel_tiles = tiles.grid(rows, length, channels)
    if programs:
        with support.on_device(source):
            _forward_diffusion_kernel[(programs,)](
                source.contiguous(), draws if ids is None else ids.contiguous(),
                alpha.contiguous(), sigma.contiguous(), _bytes(mask, draws), draws, out,
                signed(stream), length, channels, len(source), position_tiles, channel_tiles,
                GATHER=ids is not None, MASKED=mask is not None, **tiles.constants(),
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return out


def scale_targets(
    x: Tensor, alpha: Tensor, mask: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """alpha x where mask is True, x elsewhere: [B, L, d] in `dtype` or that of x."""
    rows, length, channels = x.shape
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    alpha = alpha.contiguous()
    tiles = tiling(channels)
    programs, position_tiles, channel_tiles = tiles.grid(rows, length, channels)
    if programs:
        with support.on_device(x):
            _scale_targets_kernel[(programs,)](
                x.contiguous(), alpha, _bytes(mask, alpha), out, length, channels,
                position_tiles, channel_tiles, MASKED=mask is not None, **tiles.constants(),
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return out


def _bytes(mask: Tensor | None, unused: Tensor) -> Tensor:
    """The mask as bytes; `unused`, any contiguous tensor, stands in where there is none."""
    # A kernel that is not masked never reads its mask argument, but needs a pointer.
    return unused.view(torch.uint8) if mask is None else mask.contiguous().view(torch.uint8)


def _builds(tiles: Tiling, masked: bool) -> Iterator[Build]:
    tile = {"MASKED": masked, **tiles.constants()}
    launch: dict[str, Any] = {"num_warps": NUM_WARPS, "multiples_of_16": ("length", "channels")}
    integers = {"ids_ptr": "*i64", "mask_ptr": "*u8", "draws_ptr": "*i64"}
    for dtype in ("*fp32", "*fp16", "*bf16"):
        types = {"x0_ptr": dtype, "x_ptr": dtype, "out_ptr": dtype, **integers}
        for gather in (False, True):
            constants = {"GATHER": gather, **tile}
            yield build(_forward_diffusion_kernel, constants, types, **launch)
        # The gradient of x_0 has its dtype, that of a table is fp32.
        for out in dict.fromkeys((dtype, "*fp32")):
            yield build(_scale_targets_kernel, tile, {**types, "out_ptr": out}, **launch)


SHIPPED = tuple(
    each for tiles in (NARROW, WIDE) for masked in (False, True) for each in _builds(tiles, masked)
)
