"""Philox 4x32-10 and Box-Muller for kernels: the specification is in `kernels/noise.py`.

The words are exact. The normals are evaluated in fp32 by polynomials of our own after an exact
range reduction, without any library function, so every GPU and the interpreter give nearly the
same bits: within 1e-6 of the fp64 evaluation.
"""

# Triton gives kernels no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)


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
def words(k0, k1, stream, sample, step, c3):
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
    w0, w1, w2, w3 = words(k0, k1, stream, sample, step, c3)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (ROWS, CHANNELS))
