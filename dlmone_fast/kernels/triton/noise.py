"""Counter-based noise on a GPU: the Triton backend of `kernels/noise.py`."""

# Triton gives kernels no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlmone_fast.kernels.triton import philox, support
from dlmone_fast.kernels.triton.support import Build

NUM_WARPS = 4
# Counters in one program, four channels each: eight channels for every thread.
_COUNTERS = 256
_WORD_COUNTERS = 512


@dataclass(frozen=True)
class Tiling:
    """How [B, L, d] is shared out: a program makes POSITIONS x 4 BLOCKS channels of a row."""

    positions_per_program: int
    blocks_per_program: int

    def constants(self) -> dict[str, int]:
        """The constexpr arguments of a kernel."""
        return {"POSITIONS": self.positions_per_program, "BLOCKS": self.blocks_per_program}

    def grid(self, rows: int, positions: int, channels: int) -> tuple[int, int, int]:
        """(programs, position tiles, channel tiles)."""
        position_tiles = triton.cdiv(positions, self.positions_per_program)
        channel_tiles = triton.cdiv(channels, 4 * self.blocks_per_program)
        return rows * position_tiles * channel_tiles, position_tiles, channel_tiles


NARROW, WIDE = (Tiling(_COUNTERS // blocks, blocks) for blocks in (8, 32))


def tiling(channels: int) -> Tiling:
    """The tiling for `channels` channels: narrow rows would leave a wide program idle."""
    return NARROW if channels <= 4 * NARROW.blocks_per_program else WIDE


@triton.jit
def tile_of_program(position_tiles, channel_tiles, POSITIONS: tl.constexpr, BLOCKS: tl.constexpr):
    """(row, positions [POSITIONS], channel blocks [BLOCKS]) of this program."""
    program = tl.program_id(0)
    row = program // (position_tiles * channel_tiles)
    tile = program % (position_tiles * channel_tiles)
    positions = tile // channel_tiles * POSITIONS + tl.arange(0, POSITIONS)
    blocks = tile % channel_tiles * BLOCKS + tl.arange(0, BLOCKS)
    return row.to(tl.int64), positions, blocks


@triton.jit
def tile_normals(
    draws_ptr, row, stream, positions, blocks, channels,
    POSITIONS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """fp32 [POSITIONS, 4 BLOCKS]: the noise of one tile."""
    k0, k1, sample, step = philox.load_draw(draws_ptr, row)
    # Counter words wrap at 2^32 in blocks that lie beyond the last channel, which nobody keeps.
    c3 = positions.to(tl.uint32)[:, None] * tl.cdiv(channels, 4) + blocks.to(tl.uint32)[None, :]
    return philox.normals(k0, k1, stream, sample, step, c3, POSITIONS, 4 * BLOCKS)


@triton.jit
def tile_place(
    row, positions, blocks, length, channels, POSITIONS: tl.constexpr, BLOCKS: tl.constexpr
):
    """Offsets into [B, L, d] and channels [4 BLOCKS] of one tile, and which of them exist."""
    first = tl.min(blocks, 0) * 4
    channel = first + tl.arange(0, 4 * BLOCKS)
    exists = (positions < length)[:, None] & (channel < channels)[None, :]
    offsets = (row * length + positions)[:, None] * channels + channel[None, :]
    return offsets, channel, exists


# A stream is a value, not a shape: one compiled kernel serves all of them.
@triton.jit(do_not_specialize=["stream"])
def _normal_kernel(
    draws_ptr, out_ptr, stream, length, channels, position_tiles, channel_tiles,
    POSITIONS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row, positions, blocks = tile_of_program(position_tiles, channel_tiles, POSITIONS, BLOCKS)
    noise = tile_normals(draws_ptr, row, stream, positions, blocks, channels, POSITIONS, BLOCKS)
    offsets, _, exists = tile_place(row, positions, blocks, length, channels, POSITIONS, BLOCKS)
    tl.store(out_ptr + offsets, noise, mask=exists)


@triton.jit(do_not_specialize=["stream", "first"])
def _words_kernel(draws_ptr, out_ptr, stream, first, count, tiles, COUNTERS: tl.constexpr):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    index = program % tiles * COUNTERS + tl.arange(0, COUNTERS)
    k0, k1, sample, step = philox.load_draw(draws_ptr, row)
    c3 = index.to(tl.uint32) + first
    w0, w1, w2, w3 = philox.words(k0, k1, stream, sample, step, c3)
    to_ptr = out_ptr + (row * count + index) * 4
    exists = index < count
    tl.store(to_ptr, w0.to(tl.int64), mask=exists)
    tl.store(to_ptr + 1, w1.to(tl.int64), mask=exists)
    tl.store(to_ptr + 2, w2.to(tl.int64), mask=exists)
    tl.store(to_ptr + 3, w3.to(tl.int64), mask=exists)


def signed(word: int) -> int:
    """The int32 with the bits of `word`, which keeps kernel arguments 32 bits wide."""
    return word - (1 << 32) if word >= 1 << 31 else word


def normal(draws: Tensor, stream: int, positions: int, channels: int) -> Tensor:
    """fp32 [B, positions, channels] from int64 draws [B, 4]."""
    out = torch.empty(len(draws), positions, channels, dtype=torch.float32, device=draws.device)
    tiles = tiling(channels)
    programs, position_tiles, channel_tiles = tiles.grid(len(draws), positions, channels)
    if programs:
        with support.on_device(draws):
            _normal_kernel[(programs,)](
                draws.contiguous(), out, signed(stream), positions, channels, position_tiles,
                channel_tiles, **tiles.constants(), num_warps=NUM_WARPS,
            )  # fmt: skip
    return out


def words(draws: Tensor, stream: int, first: int, count: int) -> Tensor:
    """int64 [B, count, 4]: the words of counters first, first + 1, ..."""
    out = torch.empty(len(draws), count, 4, dtype=torch.int64, device=draws.device)
    tiles = triton.cdiv(count, _WORD_COUNTERS)
    if len(draws) * tiles:
        with support.on_device(draws):
            _words_kernel[(len(draws) * tiles,)](
                draws.contiguous(), out, signed(stream), signed(first), count, tiles,
                COUNTERS=_WORD_COUNTERS, num_warps=NUM_WARPS,
            )  # fmt: skip
    return out


SHIPPED = (
    *(
        Build(
            _normal_kernel,
            {"draws_ptr": "*i64", "out_ptr": "*fp32", "stream": "i32", "length": "i32",
             "channels": "i32", "position_tiles": "i32", "channel_tiles": "i32"},
            tiles.constants(),
            num_warps=NUM_WARPS,
            multiples_of_16=("length", "channels"),
        )
        for tiles in (NARROW, WIDE)
    ),
    Build(
        _words_kernel,
        {"draws_ptr": "*i64", "out_ptr": "*i64", "stream": "i32", "first": "i32", "count": "i32",
         "tiles": "i32"},
        {"COUNTERS": _WORD_COUNTERS},
        num_warps=NUM_WARPS,
    ),
)  # fmt: skip
