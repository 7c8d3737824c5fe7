"""An embedding table with what nearest-token rounding prepares of it once per model."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

T = TypeVar("T")
_handles = itertools.count(1)
_alive: weakref.WeakValueDictionary[int, Vocabulary] = weakref.WeakValueDictionary()


class Vocabulary:
    """E [V, d] and what each backend makes of it, kept until the table changes.

    Pass one to `nearest_token` instead of the tensor wherever the same table rounds many times.
    The first call on a backend prepares its copy: packed panels in 8 bits or fp32 on a CPU
    (V d bytes or four times that), a 16-bit table and half norms on a GPU (2 V d bytes). Later
    calls, from any thread, only read it.

    The table is shared, not copied. In-place changes that torch counts (`tensor._version`) are
    seen at the next call, which prepares again. Not seen are writes through `.data`, through
    memory shared with another library, and in tables made under `torch.inference_mode`: call
    `forget` after those. A CUDA graph that was captured keeps reading what it was captured with.

    Args:
        embedding: E [V, d] in fp32, fp16 or bf16, any strides, V, d >= 1.
        transient: made for one call; backends then prepare no more than that call needs.

    Attributes:
        table: the tensor, without gradients.

    Raises:
        UsageError: the embedding is not such a table.
    """

    def __init__(self, embedding: Tensor, *, transient: bool = False) -> None:
        check_table(embedding)
        self.table = embedding.detach()
        self.transient = transient
        self.handle = next(_handles)
        self._kept: dict[Hashable, tuple[int | None, Any]] = {}
        self._lock = threading.RLock()
        _alive[self.handle] = self

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        rows, width = self.table.shape
        return f"Vocabulary({rows} x {width}, {self.table.dtype}, {self.table.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles carry the table alone: the rest depends on the machine.
        return Vocabulary, (self.table,)

    def to(self, device: torch.device | str) -> Vocabulary:
        """A vocabulary on `device`; this one where it is there already."""
        moved = self.table.to(device)
        return self if moved is self.table else Vocabulary(moved)

    def forget(self) -> None:
        """Prepare again at the next call."""
        with self._lock:
            self._kept.clear()

    def prepared(self, key: Hashable, make: Callable[[Tensor], T]) -> T:
        """`make(table)`, called once for each key and state of the table."""
        version = _version(self.table)
        kept = self._kept.get(key)
        if kept is not None and kept[0] == version:
            found: T = kept[1]
            return found
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or kept[0] != version:
                kept = version, make(self.table)
                self._kept[key] = kept
            made: T = kept[1]
            return made


def _version(table: Tensor) -> int | None:
    return None if table.is_inference() else table._version


def find(handle: int) -> Vocabulary | None:
    """The vocabulary with this handle, if something still holds it.

    Custom operations take tensors and numbers only: they get the handle.
    """
    return _alive.get(handle)


def check_table(embedding: Tensor) -> None:
    """Refuse what is not an embedding table."""
    if embedding.dim() != 2 or 0 in embedding.shape:
        raise UsageError(
            "nearest_token: embedding must have shape [V, d] with V, d >= 1, "
            f"got {tuple(embedding.shape)}"
        )
    check_dtype("embedding", embedding)


def check_dtype(name: str, tensor: Tensor) -> None:
    """Refuse dtypes that no backend reads."""
    if tensor.dtype not in DTYPES:
        raise UsageError(
            f"nearest_token: {name} must be float32, float16 or bfloat16, got {tensor.dtype}; "
            "convert it with .float()"
        )
