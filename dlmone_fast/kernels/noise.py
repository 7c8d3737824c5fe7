r"""Counter-based random numbers: Philox 4x32-10 (Salmon et al., SC 2011) and what is made of it.

Every random number of this package is a pure function of a seed and a counter, so a row's
noise does not depend on the batch around it, on the device, or on what was drawn before.

The packing, which every implementation follows bit for bit::

    key     = 64-bit seed            k0 = low 32 bits, k1 = high 32 bits
    counter = (c0, c1, c2, c3)       c0 = stream, the purpose (`Stream`)
                                     c1 = sample: candidate index in generation (never the
                                          batch row), global sample index in training
                                     c2 = step: re-noising step or training step
                                     c3 = position * ceil(channels / 4) + channel block

One counter gives four 32-bit words r0..r3, the four channels of a block. Normals follow
Box and Muller (1958), with u and v in fp32::

    u = float(r0) * 2^-32 + 2^-33    v = float(r1) * 2^-32 + 2^-33
    channel 0 = sqrt(-2 ln u) cos(2 pi v),  channel 1 = sqrt(-2 ln u) sin(2 pi v)

and the same from (r2, r3) for channels 2 and 3. Here the functions of u and v are evaluated in
fp64 and rounded once: vectorised fp32 routines differ in the last bit between the body and
the tail of a loop, which would make a row's noise depend on its place in the batch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError

_MASK = 0xFFFFFFFF
_LIMIT = 1 << 32
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# Counters a pass of the generator: bounds the memory of its int64 temporaries (0.5 MB each).
# 2^16 measured fastest on a CPU: smaller passes pay the call overhead, larger ones the cache.
_COUNTERS_PER_PASS = 1 << 16

PerRow: TypeAlias = int | Sequence[int] | Tensor


class Stream(IntEnum):
    """What a random number is for: the first counter word. Values never change meaning."""

    GENERATION = 0
    DATA_ORDER = 1
    TIMESTEP = 2
    SCORE_LATENT = 3
    SCORE_FAKE_NOISE = 4
    SCORE_REAL_NOISE = 5
    SCORE_TIMESTEP = 6
    GENERATOR_LATENT = 7
    GENERATOR_NOISE = 8
    GENERATOR_TIMESTEP = 9
    EMBEDDING_NOISE = 10
    TEACHER_NOISE = 11
    DROPOUT = 13
    BATCH_REAL = 14
    BATCH_FAKE = 15
    EVALUATION = 16
    REAL_EMBEDDING_NOISE = 17
    GENERATOR_EMBEDDING_NOISE = 18


def philox_4x32(key: tuple[Tensor | int, Tensor | int], counter: Tensor) -> Tensor:
    """Ten rounds of Philox 4x32.

    Args:
        key: (k0, k1), each an int or an int64 tensor that broadcasts with `counter[..., 0]`,
            values in [0, 2^32).
        counter: int64 [..., 4], values in [0, 2^32).

    Returns:
        int64 [..., 4], values in [0, 2^32).
    """
    return torch.stack(_rounds(key, counter.unbind(-1)), dim=-1)


def random_bits(
    seed: PerRow, stream: int, sample: PerRow, step: PerRow, index: int | Tensor
) -> Tensor:
    """Uniform 32-bit words as int64, one for each element of the broadcast arguments.

    Word `index` is word index % 4 of the block with c3 = index // 4. Sequences count as 1-D
    tensors. The result lies on the device of the first tensor argument (default: CPU).
    """
    device = _device_of(sample, step, index, seed)
    words = torch.as_tensor(_word("index", index, device, limit=4 * _LIMIT), device=device)
    stacked = torch.stack(_block(seed, stream, sample, step, words >> 2, device), dim=-1)
    return stacked.gather(-1, (words & 3).expand(stacked.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def normal(
    seed: PerRow,
    stream: int,
    sample: PerRow,
    step: PerRow,
    positions: int,
    channels: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise, fp32 [B, positions, channels].

    Args:
        seed: one 64-bit seed, or one for each row (0 <= seed < 2^64).
        stream: the purpose, a `Stream`.
        sample: one sample index, or one for each row (0 <= sample < 2^32).
        step: one step, or one for each row (0 <= step < 2^32).
        positions: sequence length L >= 0.
        channels: embedding dimension d >= 1.
        device: where to compute; default: the device of `sample`, else the CPU.

    B is the common length of the per-row arguments, 1 if all are ints. Row i is the same
    whatever the other rows are, bit for bit.

    Raises:
        UsageError: an argument out of range, or per-row lengths that differ.
    """
    target = torch.device(device) if device is not None else _device_of(sample, step, seed)
    rows = _row_count(seed=seed, sample=sample, step=step)
    blocks = _blocks_of(positions, channels)
    key = _key(seed, target)
    samples = _word("sample", sample, target)
    steps = _word("step", step, target)
    out = torch.empty(rows, positions, blocks * 4, dtype=torch.float32, device=target)
    flat = out.view(rows, positions * blocks, 4)
    rows_per_pass = max(1, _COUNTERS_PER_PASS // max(1, positions * blocks))
    index = torch.arange(positions * blocks, dtype=torch.int64, device=target)
    for first in range(0, rows, rows_per_pass):
        part = slice(first, first + rows_per_pass)
        words = _rounds(
            (_rows_of(key[0], part), _rows_of(key[1], part)),
            (int(stream), _rows_of(samples, part), _rows_of(steps, part), index),
        )
        _box_muller(words, flat[part])
    return out[..., :channels]


def uniform_integers(
    seed: PerRow, stream: int, sample: PerRow, step: PerRow, low: int, high: int
) -> Tensor:
    """Integers in [low, high), int64, one for each element of the broadcast arguments.

    Multiply-shift on the 64 bits of words 0 (low) and 1 (high) of the block with c3 = 0: the
    probabilities are off by at most (high - low) / 2^64.
    """
    span = high - low
    if not 1 <= span < 1 << 31:
        raise UsageError(f"uniform_integers: expected 1 <= high - low < 2^31, got [{low}, {high})")
    lower, upper = _block(seed, stream, sample, step, 0, _device_of(sample, step, seed))[:2]
    return low + ((upper * span + (lower * span >> 32)) >> 32)


def permutation(seed: int, stream: int, epoch: int, n: int) -> Tensor:
    """The order of n items in an epoch, int64 [n]: a pure function of its arguments.

    Items are sorted by a 64-bit key: words 0 (high half) and 1 (low half) of the block with
    sample = item, step = epoch. Equal keys keep the item order.
    """
    if not 0 <= n <= _LIMIT:
        raise UsageError(f"permutation: n must lie in [0, 2^32], got {n}")
    items = torch.arange(n, dtype=torch.int64)
    words = _rounds(_key(seed, items.device), (int(stream), items, _word("step", epoch, None), 0))
    # Subtracting 2^31 keeps the unsigned order in the signed 64-bit keys.
    keys = torch.as_tensor(words[0]) - (1 << 31) << 32 | torch.as_tensor(words[1])
    return torch.argsort(keys, stable=True)


def _block(
    seed: PerRow,
    stream: int,
    sample: PerRow,
    step: PerRow,
    position: int | Tensor,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The four words of one counter block each, broadcast to the arguments' common shape."""
    samples, steps = _word("sample", sample, device), _word("step", step, device)
    words = _rounds(_key(seed, device), (int(stream), samples, steps, position))
    return torch.broadcast_tensors(*words)


def _rounds(
    key: tuple[Tensor | int, Tensor | int], counter: Sequence[Tensor | int]
) -> list[Tensor]:
    # int64 products wrap, but keep the 64 bits of the unsigned product: the arithmetic shift
    # and the mask then give its exact high word. Words 1 and 3 are masked only by the next
    # round's mask, which saves two passes a round.
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((product0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = _wrap(product1), _wrap(product0)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [torch.as_tensor(word) for word in (c0, c1 & _MASK, c2, c3 & _MASK)]


def _wrap(product: Tensor | int) -> Tensor | int:
    # A counter word given as a Python int does not wrap at 64 bits by itself.
    return product & _MASK if isinstance(product, int) else product


def _box_muller(words: Sequence[Tensor], out: Tensor) -> None:
    for first, (radius_word, angle_word) in enumerate((words[:2], words[2:])):
        radius = _unit_interval(radius_word).log_().mul_(-2.0).sqrt_()
        angle = _unit_interval(angle_word).mul_(2.0 * math.pi)
        out[..., 2 * first] = angle.cos().mul_(radius)
        out[..., 2 * first + 1] = angle.sin_().mul_(radius)


def _unit_interval(word: Tensor) -> Tensor:
    # 2^-32 scales exactly, so the two fp32 roundings are the conversion and the sum. The sum
    # reaches 1.0 but never 0.0: the logarithm is finite and not positive.
    return word.float().mul_(2.0**-32).add_(2.0**-33).double()


def _blocks_of(positions: int, channels: int) -> int:
    if positions < 0 or channels < 1:
        raise UsageError(
            "normal: expected positions >= 0 and channels >= 1, "
            f"got positions={positions}, channels={channels}"
        )
    blocks = -(-channels // 4)
    if positions * blocks > _LIMIT:
        raise UsageError(
            f"normal: positions * ceil(channels / 4) must not exceed 2^32 (one counter word), "
            f"got {positions} * {blocks}"
        )
    return blocks


def _device_of(*values: int | Sequence[int] | Tensor) -> torch.device:
    return next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))


def _row_count(**values: PerRow) -> int:
    lengths = {n: len(v) for n, v in values.items() if not isinstance(v, int) and _is_per_row(v)}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise UsageError(f"per-row arguments must have one length, but {listed}")
    return next(iter(lengths.values()), 1)


def _is_per_row(value: PerRow) -> bool:
    return value.dim() == 1 if isinstance(value, Tensor) else isinstance(value, Sequence)


def _key(seed: PerRow, device: torch.device) -> tuple[Tensor | int, Tensor | int]:
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    if not isinstance(seed, Sequence):
        value = _seed(seed)
        return value & _MASK, value >> 32
    # Seeds use all 64 bits, which int64 tensors cannot hold: split them as Python ints.
    values = [_seed(s) for s in seed]
    halves = [[v & _MASK for v in values], [v >> 32 for v in values]]
    low, high = torch.tensor(halves, dtype=torch.int64, device=device)
    return low, high


def _seed(seed: object) -> int:
    try:
        value = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"seed must be an int, got {type(seed).__name__}") from None
    if not 0 <= value < 1 << 64:
        raise UsageError(f"seed must lie in [0, 2^64), got {value}")
    return value


def _word(
    name: str, value: PerRow, device: torch.device | None, limit: int = _LIMIT
) -> Tensor | int:
    """`value` as an int or an int64 tensor on `device`, all of it in [0, limit)."""
    if isinstance(value, Tensor):
        tensor = value.to(device=device, dtype=torch.int64)
    elif isinstance(value, Sequence):
        tensor = torch.tensor(value, dtype=torch.int64, device=device)
    else:
        value = operator.index(value)
        if not 0 <= value < limit:
            raise UsageError(f"{name} must lie in [0, {limit}), got {value}")
        return value
    # A device tensor is not read back: that would stall the stream at every draw.
    if tensor.device.type == "cpu" and tensor.numel() and not _within(tensor, limit):
        raise UsageError(f"{name} must lie in [0, {limit}), got {tensor.tolist()}")
    return tensor


def _within(tensor: Tensor, limit: int) -> bool:
    low, high = torch.aminmax(tensor)
    return bool(low >= 0) and bool(high < limit)


def _rows_of(value: Tensor | int, part: slice) -> Tensor | int:
    """A per-row word ready to broadcast with a row of counters: [rows, 1]."""
    return value[part, None] if isinstance(value, Tensor) and value.dim() == 1 else value
