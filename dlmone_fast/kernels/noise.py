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

import operator
from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import dispatch, native, philox
from dlmone_fast.kernels.triton import support

_MASK = 0xFFFFFFFF
_LIMIT = 1 << 32
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
    return torch.stack(philox.rounds(key, counter.unbind(-1)), dim=-1)


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
        UsageError: an argument out of range, or per-row lengths that differ.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    target = torch.device(device) if device is not None else _device_of(sample, step, seed)
    draws = draws_of(seed, sample, step, target)
    return normal_of_draws(draws, stream, positions, channels, kernel_backend=kernel_backend)


def draws_of(seed: PerRow, sample: PerRow, step: PerRow, device: torch.device) -> Tensor:
    """What a row's noise depends on besides stream and position: int64 [B, 4] on `device`.

    The columns are k0, k1, sample, step, each in [0, 2^32). Arguments and errors as for `normal`.
    """
    columns = [*_key(seed, device), _word("sample", sample, None), _word("step", step, None)]
    if not any(isinstance(column, Tensor) for column in columns):
        return torch.tensor([columns], dtype=torch.int64, device=device)
    rows = _row_count(seed=seed, sample=sample, step=step)
    draws = torch.empty(rows, 4, dtype=torch.int64, device=device)
    for name, column in (("sample", columns[2]), ("step", columns[3])):
        if isinstance(column, Tensor) and column.dim() > 1:
            shape = tuple(column.shape)
            raise UsageError(f"{name} must be one number or 1-D, got shape {shape}")
    for place, column in enumerate(columns):
        draws[:, place] = column
    return draws


def normal_of_draws(
    draws: Tensor, stream: int, positions: int, channels: int, *, kernel_backend: str | None = None
) -> Tensor:
    """`normal` for rows given as `draws_of` gives them, on the device of `draws`.

    The contents of `draws` are not read back: they may sit in memory that a CUDA graph rewrites.
    """
    _check_draws("normal", draws, stream)
    _blocks_of(positions, channels)
    wanted = dispatch.requested("noise", kernel_backend)
    if torch.compiler.is_compiling():
        return _normal(draws, int(stream), positions, channels, wanted)
    return _run_normal(draws, int(stream), positions, channels, wanted)


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
    _check_draws("words_of_draws", draws, stream)
    if first < 0 or count < 0 or first + count > _LIMIT:
        raise UsageError(
            f"words_of_draws: counters must lie in [0, 2^32), got first={first} and count={count}"
        )
    return _words(
        draws, int(stream), first, count, dispatch.requested("noise_bits", kernel_backend)
    )


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
    words = philox.rounds(
        _key(seed, items.device), (int(stream), items, _word("step", epoch, None), 0)
    )
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
    words = philox.rounds(_key(seed, device), (int(stream), samples, steps, position))
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
    if draws.device.type != "cpu":
        return f"it runs on CPU tensors, not on {draws.device.type}"
    return native.why_missing()


def _cpp(draws: Tensor, stream: int, positions: int, channels: int, path: str = "") -> Tensor:
    rows, draws = draws.shape[0], draws.contiguous()
    out = torch.empty(rows, positions, channels, dtype=torch.float32)
    native.module().normal(
        draws.data_ptr(),
        rows,
        stream,
        positions,
        channels,
        out.data_ptr(),
        torch.get_num_threads(),
        path,
    )
    return out


def _cpp_words(draws: Tensor, stream: int, first: int, count: int, path: str = "") -> Tensor:
    rows, draws = draws.shape[0], draws.contiguous()
    out = torch.empty(rows, count, 4, dtype=torch.int64)
    native.module().philox_words(
        draws.data_ptr(),
        rows,
        stream,
        first,
        count,
        out.data_ptr(),
        torch.get_num_threads(),
        path,
    )
    return out


def _check_draws(op: str, draws: Tensor, stream: int) -> None:
    if draws.dtype != torch.int64 or draws.dim() != 2 or draws.shape[1] != 4:
        raise UsageError(
            f"{op}: draws must be int64 [B, 4] (k0, k1, sample, step), "
            f"got {draws.dtype} {tuple(draws.shape)}; make them with draws_of"
        )
    if not 0 <= stream < _LIMIT:
        raise UsageError(f"{op}: stream must lie in [0, 2^32), got {stream}; see noise.Stream")


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
    # A device tensor is not read back: that would stall the stream at every draw. While a graph
    # is traced there is nothing to read.
    readable = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and tensor.numel() and not _within(tensor, limit):
        raise UsageError(f"{name} must lie in [0, {limit}), got {tensor.tolist()}")
    return tensor


def _within(tensor: Tensor, limit: int) -> bool:
    low, high = torch.aminmax(tensor)
    return bool(low >= 0) and bool(high < limit)


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
