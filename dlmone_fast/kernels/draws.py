"""What a random number depends on, checked: key and counter words from a caller's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias

import torch
from torch import Tensor

from dlmone_fast.checks import as_whole
from dlmone_fast.errors import UsageError

LIMIT = 1 << 32
_MASK = LIMIT - 1
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
    SELF_CONDITIONING = 19
    CONDITION_DROPOUT = 20
    PAIR_ORDER = 21
    PAIR_LATENT = 22
    ANCHOR_ORDER = 23
    SCORE_CALLS = 24
    GENERATOR_CALLS = 25
    FAKE_PAD = 26
    REAL_PAD = 27
    GENERATOR_PAD = 28
    BATCH_ORDER = 29


def draws_of(seed: PerRow, sample: PerRow, step: PerRow, device: torch.device) -> Tensor:
    """What a row's noise depends on besides stream and position: int64 [B, 4] on `device`.

    The columns are k0, k1, sample, step, each in [0, 2^32). Arguments and errors as for
    `noise.normal`.
    """
    columns = [*key_of(seed, device), word("sample", sample, None), word("step", step, None)]
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


def check_draws(op: str, draws: Tensor, rows: int | None = None) -> None:
    """Refuse what is not int64 [B, 4], with `rows` for B if it is given."""
    fits = draws.dtype == torch.int64 and draws.dim() == 2 and draws.shape[1] == 4
    if not fits or rows not in (None, len(draws)):
        raise UsageError(
            f"{op}: draws must be int64 [{'B' if rows is None else rows}, 4] "
            f"(k0, k1, sample, step), got {draws.dtype} {tuple(draws.shape)}; "
            "make them with draws_of"
        )


def stream_word(op: str, stream: int) -> int:
    """`stream` as a counter word."""
    value = _index("stream", stream)
    if not 0 <= value < LIMIT:
        raise UsageError(f"{op}: stream must lie in [0, 2^32), got {stream}; see noise.Stream")
    return value


def key_of(seed: PerRow, device: torch.device) -> tuple[Tensor | int, Tensor | int]:
    """(k0, k1): ints for one seed, int64 tensors on `device` for one a row."""
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


def word(name: str, value: PerRow, device: torch.device | None, limit: int = LIMIT) -> Tensor | int:
    """`value` as an int or an int64 tensor on `device`, all of it in [0, limit).

    Without a device a tensor stays where it is, and a sequence is on the CPU.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise UsageError(f"{name} must hold integers, got {value.dtype}; convert with .long()")
        tensor = value.to(device=device, dtype=torch.int64)
    elif isinstance(value, Sequence):
        numbers = [_index(name, each) for each in value]
        tensor = torch.tensor(numbers, dtype=torch.int64, device=device or "cpu")
    else:
        number = _index(name, value)
        if not 0 <= number < limit:
            raise UsageError(f"{name} must lie in [0, {limit}), got {number}")
        return number
    # A device tensor is not read back: that would stall the stream at every draw. While a graph
    # is traced there is nothing to read.
    readable = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and tensor.numel() and not _within(tensor, limit):
        raise UsageError(f"{name} must lie in [0, {limit}), got {tensor.tolist()}")
    return tensor


def device_of(*values: PerRow) -> torch.device:
    """The device of the first tensor, else the CPU."""
    return next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))


def _row_count(**values: PerRow) -> int:
    lengths = {n: len(v) for n, v in values.items() if not isinstance(v, int) and _is_per_row(v)}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise UsageError(f"per-row arguments must have one length, but {listed}")
    return next(iter(lengths.values()), 1)


def _is_per_row(value: PerRow) -> bool:
    return value.dim() == 1 if isinstance(value, Tensor) else isinstance(value, Sequence)


def _seed(seed: object) -> int:
    value = _index("seed", seed)
    if not 0 <= value < 1 << 64:
        raise UsageError(f"seed must lie in [0, 2^64), got {value}")
    return value


def _index(name: str, value: object) -> int:
    number = as_whole(value)
    if number is None:
        raise UsageError(f"{name} must be an int, got {type(value).__name__}")
    return number


def _within(tensor: Tensor, limit: int) -> bool:
    low, high = torch.aminmax(tensor)
    return bool(low >= 0) and bool(high < limit)
