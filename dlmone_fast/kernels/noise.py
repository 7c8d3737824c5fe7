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

The words are the same on every backend. The normals of the cpp backend (fp64, polynomials of its
own) differ from torch's in the last bit of less than one value in 10^5, and at exact quarter turns
it gives 0 where torch gives the rounding of pi; the Triton kernel evaluates in fp32, within 1e-6
of both. Each backend gives a row the same bits in any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlmone_fast.checks import is_whole
from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import dispatch, native, philox
from dlmone_fast.kernels.draws import (
    LIMIT,
    PerRow,
    Stream,
    check_draws,
    device_of,
    draws_of,
    key_of,
    stream_word,
    word,
)
from dlmone_fast.kernels.triton import support

NORMAL_NS = 4.3
"""What a normal number takes in C++ on one thread: measured on AVX-512 at 2.5 GHz."""

__all__ = [
    "PerRow",
    "Stream",
    "draws_of",
    "normal",
    "normal_of_draws",
    "permutation",
    "philox_4x32",
    "random_bits",
    "uniform_integers",
    "words_of_draws",
]


def philox_4x32(key: tuple[Tensor | int, Tensor | int], counter: Tensor) -> Tensor:
    """Ten rounds of Philox 4x32.

    Args:
        key: (k0, k1), each an int or an int64 tensor that broadcasts with `counter[..., 0]`,
            values in [0, 2^32).
        counter: int64 [..., 4], values in [0, 2^32).

    Returns:
        int64 [..., 4], values in [0, 2^32).
    """
    return torch.stack(philox.rounds(key, counter.unbind(-1)), dim=-1)


def random_bits(
    seed: PerRow, stream: int, sample: PerRow, step: PerRow, index: int | Tensor
) -> Tensor:
    """Uniform 32-bit words as int64, one for each element of the broadcast arguments.

    Word `index` is word index % 4 of the block with c3 = index // 4. Sequences count as 1-D
    tensors. The result lies on the device of the first tensor argument (default: CPU).
    """
    device = device_of(sample, step, index, seed)
    words = torch.as_tensor(word("index", index, device, limit=4 * LIMIT), device=device)
    purpose = stream_word("random_bits", stream)
    stacked = torch.stack(_block(seed, purpose, sample, step, words >> 2, device), dim=-1)
    return stacked.gather(-1, (words & 3).expand(stacked.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def normal(
    seed: PerRow,
    stream: int,
    sample: PerRow,
    step: PerRow,
    positions: int,
    channels: int,
    device: torch.device | str | None = None,
    kernel_backend: str | None = None,
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
        kernel_backend: "triton", "cpp", "torch", "auto"; default as `dispatch` says.

    B is the common length of the per-row arguments, 1 if all are ints. Row i is the same
    whatever the other rows are, bit for bit.

    Raises:
        UsageError: an argument out of range or not an integer, or per-row lengths that differ.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    target = torch.device(device) if device is not None else device_of(sample, step, seed)
    draws = draws_of(seed, sample, step, target)
    return normal_of_draws(draws, stream, positions, channels, kernel_backend=kernel_backend)


def normal_of_draws(
    draws: Tensor, stream: int, positions: int, channels: int, *, kernel_backend: str | None = None
) -> Tensor:
    """`normal` for rows given as `draws_of` gives them, on the device of `draws`.

    The contents of `draws` are not read back: they may sit in memory that a CUDA graph rewrites.
    """
    check_draws("normal", draws)
    purpose = stream_word("normal", stream)
    _blocks_of(positions, channels)
    wanted = dispatch.requested("noise", kernel_backend)
    run = _normal if torch.compiler.is_compiling() else _run_normal
    return run(draws, purpose, positions, channels, wanted)


def words_of_draws(
    draws: Tensor, stream: int, count: int, first: int = 0, *, kernel_backend: str | None = None
) -> Tensor:
    """The words r0..r3 of counters c3 = first, first + 1, ...: int64 [B, count, 4].

    Args:
        draws: int64 [B, 4] as `draws_of` gives them.
        stream: the purpose, a `Stream`.
        count: how many counters, >= 0.
        first: the first of them; first + count <= 2^32.
        kernel_backend: "triton", "cpp", "torch", "auto"; default as `dispatch` says.
    """
    check_draws("words_of_draws", draws)
    purpose = stream_word("words_of_draws", stream)
    if first < 0 or count < 0 or first + count > LIMIT:
        raise UsageError(
            f"words_of_draws: counters must lie in [0, 2^32), got first={first} and count={count}"
        )
    return _words(draws, purpose, first, count, dispatch.requested("noise_bits", kernel_backend))


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
    purpose = stream_word("uniform_integers", stream)
    lower, upper = _block(seed, purpose, sample, step, 0, device_of(sample, step, seed))[:2]
    return low + ((upper * span + (lower * span >> 32)) >> 32)


def permutation(seed: int, stream: int, epoch: int, n: int) -> Tensor:
    """The order of n items in an epoch, int64 [n]: a pure function of its arguments.

    Items are sorted by a 64-bit key: words 0 (high half) and 1 (low half) of the block with
    sample = item, step = epoch. Equal keys keep the item order.
    """
    if not is_whole(n, 0, LIMIT):
        raise UsageError(f"permutation: n must lie in [0, 2^32], got {n!r}")
    purpose = stream_word("permutation", stream)
    items = torch.arange(n, dtype=torch.int64, device="cpu")
    words = philox.rounds(
        key_of(seed, items.device), (purpose, items, word("epoch", epoch, None), 0)
    )
    # Subtracting 2^31 keeps the unsigned order in the signed 64-bit keys.
    keys = words[0] - (1 << 31) << 32 | words[1]
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
    samples, steps = word("sample", sample, device), word("step", step, device)
    words = philox.rounds(key_of(seed, device), (stream, samples, steps, position))
    return torch.broadcast_tensors(*words)


def _run_normal(draws: Tensor, stream: int, positions: int, channels: int, wanted: str) -> Tensor:
    # Called directly outside of torch.compile: the dispatcher costs a draw a tenth of its time.
    backend = dispatch.select("noise", draws, kernel_backend=wanted)
    noise: Tensor = backend.run(draws, stream, positions, channels)
    return noise


_normal = torch.library.custom_op("dlmone_fast::normal", _run_normal, mutates_args=())


@_normal.register_fake
def _(draws: Tensor, stream: int, positions: int, channels: int, wanted: str) -> Tensor:
    return draws.new_empty(len(draws), positions, channels, dtype=torch.float32)


@torch.library.custom_op("dlmone_fast::philox_words", mutates_args=())
def _words(draws: Tensor, stream: int, first: int, count: int, wanted: str) -> Tensor:
    backend = dispatch.select("noise_bits", draws, kernel_backend=wanted)
    words: Tensor = backend.run(draws, stream, first, count)
    return words


@_words.register_fake
def _(draws: Tensor, stream: int, first: int, count: int, wanted: str) -> Tensor:
    return draws.new_empty(len(draws), count, 4)


def _triton(draws: Tensor, stream: int, positions: int, channels: int) -> Tensor:
    from dlmone_fast.kernels.triton import noise

    return noise.normal(draws, stream, positions, channels)


def _triton_words(draws: Tensor, stream: int, first: int, count: int) -> Tensor:
    from dlmone_fast.kernels.triton import noise

    return noise.words(draws, stream, first, count)


def _cpp_usable(draws: Tensor, *others: Tensor) -> str | None:
    return native.why_not_on(draws)


def _cpp(draws: Tensor, stream: int, positions: int, channels: int, path: str = "") -> Tensor:
    draws = draws.contiguous()
    out = draws.new_empty(len(draws), positions, channels, dtype=torch.float32)
    threads = native.threads_for(out.numel() * NORMAL_NS)
    native.module().normal(draws, stream, out, threads, path)
    return out


def _cpp_words(draws: Tensor, stream: int, first: int, count: int, path: str = "") -> Tensor:
    draws = draws.contiguous()
    out = draws.new_empty(len(draws), count, 4)
    threads = native.threads_for(out.numel() * NORMAL_NS)
    native.module().philox_words(draws, stream, first, out, threads, path)
    return out


def _blocks_of(positions: int, channels: int) -> int:
    if positions < 0 or channels < 1:
        raise UsageError(
            "normal: expected positions >= 0 and channels >= 1, "
            f"got positions={positions}, channels={channels}"
        )
    blocks = -(-channels // 4)
    if positions * blocks > LIMIT:
        raise UsageError(
            f"normal: positions * ceil(channels / 4) must not exceed 2^32 (one counter word), "
            f"got {positions} * {blocks}"
        )
    return blocks


dispatch.register(
    "noise",
    dispatch.Backend("triton", support.usable, _triton, support.automatic),
    dispatch.Backend("cpp", _cpp_usable, _cpp),
    dispatch.Backend("torch", lambda *tensors: None, philox.normals),
)
dispatch.register(
    "noise_bits",
    dispatch.Backend("triton", support.usable, _triton_words, support.automatic),
    dispatch.Backend("cpp", _cpp_usable, _cpp_words),
    dispatch.Backend("torch", lambda *tensors: None, philox.words),
)
