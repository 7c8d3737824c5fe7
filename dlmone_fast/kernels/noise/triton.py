"""Noise on a GPU: Philox 4x32-10 and Box-Muller in Triton (`op.py` has the formulas).

The words are exact. The normals are evaluated in fp32 by polynomials of our own after an exact
range reduction, without any library function, so every GPU and the interpreter give nearly the
same bits: within 1e-6 of the fp64 evaluation.
"""

# Triton gives kernels no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlmone_fast.kernels.triton import support
from dlmone_fast.kernels.triton.support import build

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)

NUM_WARPS = 4
# Counters in one program, four channels each: eight channels for every thread.
_COUNTERS = 256
_WORD_COUNTERS = 512


@triton.jit
def load_draw(draws_ptr, row):
    """(k0, k1, sample, step) of a row of int64 draws [B, 4], as uint32."""
    draw_ptr = draws_ptr + row * 4
    return (
        tl.load(draw_ptr).to(tl.uint32),
        tl.load(draw_ptr + 1).to(tl.uint32),
        tl.load(draw_ptr + 2).to(tl.uint32),
        tl.load(draw_ptr + 3).to(tl.uint32),
    )


@triton.jit
def philox_words(k0, k1, stream, sample, step, c3):
    """The four words of the counters (stream, sample, step, c3); uint32 (stream: int32 bits)."""
    zero = tl.zeros_like(c3)
    c0 = zero + stream
    c1 = zero + sample
    c2 = zero + step
    multiplier0 = zero + _MULTIPLIER_0
    multiplier1 = zero + _MULTIPLIER_1
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, multiplier0)
        high1 = tl.umulhi(c2, multiplier1)
        # The generator's arithmetic wraps around on purpose: nothing to check.
        low0 = tl.mul(c0, _MULTIPLIER_0, sanitize_overflow=False)
        low1 = tl.mul(c2, _MULTIPLIER_1, sanitize_overflow=False)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = tl.add(k0, _WEYL_0, sanitize_overflow=False)
        k1 = tl.add(k1, _WEYL_1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _unit_interval(word):
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def _log(u):
    """ln u for normal u in (0, 1]: u = 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt(2))."""
    bits = u.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    # ln(1 + f) = f - f^2 / 2 + f^3 p(f): exact to an ulp near u = 1, where f is exact.
    p = 0.06971611471451178
    p = p * f - 0.11479733846637635
    p = p * f + 0.1168541992348674
    p = p * f - 0.12425687331451106
    p = p * f + 0.1424905764569748
    p = p * f - 0.16667802319501254
    p = p * f + 0.200007157488921
    p = p * f - 0.24999996957950882
    p = p * f + 0.33333331180030046
    z = f * f
    scale = k.to(tl.float32)
    # ln 2 in two parts: k times the first is exact.
    small = f * z * p + scale * -2.12194440054690583e-4
    return (small - 0.5 * z) + f + scale * 0.693359375


@triton.jit
def _cosine_sine(v):
    """cos and sin of 2 pi v for v in (0, 1], by quarter turns."""
    turns = 4.0 * v
    quarter = (turns + 0.5).to(tl.int32)
    r = turns - quarter.to(tl.float32)
    z = r * r
    p = 0.00015820621473480918
    p = p * z - 0.004681266217860491
    p = p * z + 0.0796925827204243
    p = p * z - 0.6459640961465783
    p = p * z + 1.5707963267880984
    across = r * p
    p = 0.000906739400801227
    p = p * z - 0.02086152818665982
    p = p * z + 0.25366941034543866
    p = p * z - 1.2337005493740978
    along = 1.0 + z * p
    odd = (quarter & 1) != 0
    cosine = tl.where(odd, across, along)
    sine = tl.where(odd, along, across)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return cosine, sine


@triton.jit
def box_muller(radius_word, angle_word):
    """Two independent standard normals, fp32, from two words."""
    radius = tl.sqrt_rn(-2.0 * _log(_unit_interval(radius_word)))
    cosine, sine = _cosine_sine(_unit_interval(angle_word))
    return radius * cosine, radius * sine


@triton.jit
def normals(k0, k1, stream, sample, step, c3, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """fp32 [ROWS, CHANNELS]: four normals for each of the counters c3 [ROWS, CHANNELS / 4]."""
    w0, w1, w2, w3 = philox_words(k0, k1, stream, sample, step, c3)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (ROWS, CHANNELS))


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
    k0, k1, sample, step = load_draw(draws_ptr, row)
    # Counter words wrap at 2^32 in blocks that lie beyond the last channel, which nobody keeps.
    c3 = positions.to(tl.uint32)[:, None] * tl.cdiv(channels, 4) + blocks.to(tl.uint32)[None, :]
    return normals(k0, k1, stream, sample, step, c3, POSITIONS, 4 * BLOCKS)


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
    k0, k1, sample, step = load_draw(draws_ptr, row)
    c3 = index.to(tl.uint32) + first
    w0, w1, w2, w3 = philox_words(k0, k1, stream, sample, step, c3)
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
        build(
            _normal_kernel,
            tiles.constants(),
            {"draws_ptr": "*i64"},
            num_warps=NUM_WARPS,
            multiples_of_16=("length", "channels"),
        )
        for tiles in (NARROW, WIDE)
    ),
    build(
        _words_kernel,
        {"COUNTERS": _WORD_COUNTERS},
        {"draws_ptr": "*i64", "out_ptr": "*i64"},
        num_warps=NUM_WARPS,
    ),
)
