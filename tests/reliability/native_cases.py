"""Calls of every C++ entry point as they should be, with what must come of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.kernels import native
from dlmone_fast.kernels.nearest_token import reference
from dlmone_fast.kernels.noise import torch as philox

GUARD_BYTES = 64
_GUARD = 0xA5


@dataclass
class Case:
    """One call.

    Attributes:
        entry: name of the entry point.
        arguments: by name.
        outputs: names of the arguments that are written.
        is_right: compares what was written with the torch implementation.
    """

    entry: str
    arguments: dict[str, Any]
    outputs: tuple[str, ...]
    is_right: Callable[[], bool]


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor, aligned to 64 bytes, with guards around it and in it what no result is."""
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = torch.full((size + 4 * GUARD_BYTES,), _GUARD, dtype=torch.uint8)
    first = GUARD_BYTES + -memory.data_ptr() % 64
    inside = memory[first : first + size].view(dtype).view(shape)
    inside.guards = memory[:first], memory[first + size :]  # type: ignore[attr-defined]
    return inside


def guards_hold(tensor: Any) -> bool:
    """Whether nothing was written around a tensor of `guarded`; others have no guards."""
    return all(bool((guard == _GUARD).all()) for guard in getattr(tensor, "guards", ()))


def nearest_token(source: Random) -> Case:
    n, v, d = source.randrange(40), source.randrange(1, 200), source.randrange(1, 40)
    if source.random() < 0.03:
        n, v = source.choice([(1025, 3), (3, 1500)])
    x, table = _floats(source, n, d), _floats(source, v, d)
    path = source.choice(native.cpu_paths())
    packed = None
    if path.endswith("vnni") or source.random() < 0.5:
        packed = guarded((native.module().packed_bytes(v, d, path),), torch.uint8)
        native.module().pack_vocabulary(table, packed, _threads(source), path)
    ids = guarded((n,), torch.int64)
    margins = guarded((n,), torch.float32) if source.random() < 0.5 else None
    arguments = {
        "x": _strided(source, x), "embedding": _strided(source, table), "ids": ids,
        "threads": _threads(source), "path": path, "margins": margins, "packed": packed,
    }  # fmt: skip
    outputs = ("ids",) if margins is None else ("ids", "margins")
    right = lambda: torch.equal(ids, reference.nearest_token(x, table))  # noqa: E731
    return Case("nearest_token", arguments, outputs, right)


def pack_vocabulary(source: Random) -> Case:
    v, d = source.randrange(1, 200), source.randrange(1, 70)
    table, path = _floats(source, v, d), source.choice(native.cpu_paths())
    packed = guarded((native.module().packed_bytes(v, d, path),), torch.uint8)

    def right() -> bool:
        ids = torch.empty(v, dtype=torch.int64)
        native.module().nearest_token(table, table, ids, 1, path, None, packed)
        return torch.equal(ids, reference.nearest_token(table, table))

    arguments = {"embedding": _strided(source, table), "packed": packed}
    arguments |= {"threads": _threads(source), "path": path}
    return Case("pack_vocabulary", arguments, ("packed",), right)


def packed_bytes(source: Random) -> Case:
    sizes = [1, 7, 64, 1 << 15, (1 << 15) + 1, 1 << 20]
    v = source.choice([*sizes, 1 << 40, source.getrandbits(39) + 1])
    arguments = {"v": v, "d": source.choice(sizes), "path": source.choice(native.cpu_paths())}
    return Case("packed_bytes", arguments, (), lambda: True)


def normal(source: Random) -> Case:
    rows, positions, channels = _shape(source)
    given = _noise(source, rows)
    out = guarded((rows, positions, channels), torch.float32)

    def right() -> bool:
        return _close(out, philox.normals(given["draws"], given["stream"], positions, channels))

    return Case("normal", {**given, "out": out}, ("out",), right)


def philox_words(source: Random) -> Case:
    rows, count = source.randrange(6), source.randrange(200)
    first, given = source.choice([0, 1, 1000, (1 << 32) - count]), _noise(source, rows)
    out = guarded((rows, count, 4), torch.int64)

    def right() -> bool:
        return torch.equal(out, philox.words(given["draws"], given["stream"], first, count))

    return Case("philox_words", {**given, "first": first, "out": out}, ("out",), right)


def forward_diffusion(source: Random) -> Case:
    rows, positions, channels = _shape(source)
    given, numbers = _noise(source, rows), _numbers(source)
    alpha, sigma = torch.rand(2, rows, generator=numbers)
    mask = torch.rand(rows, positions, generator=numbers) < 0.5
    ids, x0 = None, torch.randn(rows, positions, channels, generator=numbers)
    clean = x0
    if source.random() < 0.5:
        vocabulary = source.randrange(1, 30)
        ids = torch.randint(vocabulary, (rows, positions), generator=numbers)
        x0 = torch.randn(vocabulary, channels, generator=numbers)
        clean = x0[ids]
    with_mask = source.random() < 0.7
    out = guarded((rows, positions, channels), torch.float32)

    def right() -> bool:
        noise = philox.normals(given["draws"], given["stream"], positions, channels)
        x_t = alpha[:, None, None] * clean + sigma[:, None, None] * noise
        return _close(out, torch.where(mask[..., None], x_t, clean) if with_mask else x_t)

    given |= {"x0": x0, "ids": ids, "alpha": alpha, "sigma": sigma}
    arguments = {**given, "mask": mask if with_mask else None, "out": out}
    return Case("forward_diffusion", arguments, ("out",), right)


ENTRIES: tuple[Callable[[Random], Case], ...] = (
    nearest_token, pack_vocabulary, packed_bytes, normal, philox_words, forward_diffusion,
)  # fmt: skip


def _numbers(source: Random) -> torch.Generator:
    return torch.Generator().manual_seed(source.getrandbits(63))


def _floats(source: Random, *shape: int) -> Tensor:
    """fp32 of an ordinary size, now and then of another or with extreme values among them."""
    values = torch.randn(shape, generator=_numbers(source))
    if source.random() < 0.1:
        values *= source.choice([1e-30, 1e20, 1e-6])
    if source.random() < 0.2 and values.numel():
        extreme = source.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1e-42, 0.0])
        values.view(-1)[source.randrange(values.numel())] = extreme
    return values


def _strided(source: Random, values: Tensor) -> Tensor:
    """The same rows, now and then with room between them."""
    if source.random() < 0.5:
        return values
    width = values.shape[1]
    room = torch.full((len(values), width + source.randrange(1, 5)), float("nan"))
    room[:, :width] = values
    return room[:, :width]


def _threads(source: Random) -> int:
    return source.choice([1, 1, 1, 2, 3])


def _shape(source: Random) -> tuple[int, int, int]:
    return source.randrange(5), source.randrange(9), source.choice([1, 2, 3, 4, 9, 64, 300])


def _noise(source: Random, rows: int) -> dict[str, Any]:
    draws = torch.randint(1 << 32, (rows, 4), generator=_numbers(source))
    path = source.choice([*(p for p in native.cpu_paths() if not p.endswith("vnni")), ""])
    stream = source.choice([0, 1, 5, (1 << 32) - 1])
    return {"draws": draws, "stream": stream, "threads": _threads(source), "path": path}


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
