"""An embedding table and the forms of it that nearest-token rounding prepares once per model."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels.dispatch import check_dtype

T = TypeVar("T")
_handles = itertools.count(1)
_alive: weakref.WeakValueDictionary[int, Vocabulary] = weakref.WeakValueDictionary()


class Vocabulary:
    """E [V, d] and the form that each backend searches, kept until the table changes.

    Pass one to `nearest_token` instead of the tensor wherever the same table rounds many times.
    The first call on a backend prepares what it reads. Later calls, from any thread, only read.
    Bytes held besides the table:

    * on CPUs 4 V d for a copy in fp32, which "torch" and "cpp" share, unless the table is fp32
      with contiguous rows. "cpp" also packs panels: about 1.1 V d in 8 bits where the CPU has
      VNNI, else 4.1 V d. Together that is 5.1 or 8.1 V d for a 16-bit table.
    * on GPUs 2 V d for a copy in 16 bits, with d rounded up (triton: to a power of two up to 128,
      beyond to a multiple of 64; cuda: to a multiple of 16), for each of the two types there may
      be, and 4 V for half norms. "torch" holds 4 V d in fp32 instead, as on CPUs.

    The table is shared, not copied. In-place changes that torch counts (`tensor._version`) are
    seen at the next call, which prepares again and frees what it prepared before. Not seen are
    writes through `.data`, through memory shared with another library, and in tables made under
    `torch.inference_mode`: call `forget` after those.

    On a GPU a call that prepares waits for it, so that other streams may read at once. Change the
    table when they have done so. A CUDA graph reads what was prepared before it was captured, by
    address: call once before capturing (preparing inside a capture is refused), and as long as the
    graph is replayed keep the vocabulary, leave its table unchanged and do not `forget`.

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
        """`make(table)`, called once for each key and state of the table.

        `make` must use its argument, and nothing prepared before: the table may have changed.

        Raises:
            UsageError: a CUDA graph is being captured, and the table was not prepared before.
        """
        # In-place changes count versions up; tensors of inference mode have none.
        version = None if self.table.is_inference() else self.table._version
        kept = self._kept.get(key)
        if kept is not None and kept[0] == version:
            prepared: T = kept[1]
            return prepared
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or kept[0] != version:
                kept = version, self._make(make)
                self._kept[key] = kept
            made: T = kept[1]
            return made

    def _make(self, make: Callable[[Tensor], T]) -> T:
        # What serves a single call is read by that call's stream alone.
        if self.table.is_cuda and not self.transient:
            return _make_for_all_streams(make, self.table)
        return make(self.table)


def _make_for_all_streams(make: Callable[[Tensor], T], table: Tensor) -> T:
    with torch.cuda.device(table.device):
        if torch.cuda.is_current_stream_capturing():
            raise UsageError(
                "nearest_token: the vocabulary is not prepared, and a CUDA graph that is being "
                "captured would fill it only when replayed; call nearest_token once with this "
                "vocabulary, these dtypes and this backend before the capture"
            )
        made = make(table)
        torch.cuda.current_stream().synchronize()
    return made


def contiguous_rows(table: Tensor) -> Tensor:
    """A matrix in fp32 with adjacent channels; itself where it is that already."""
    table = table.float()
    return table if table.stride(1) == 1 else table.contiguous()


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
    check_dtype("nearest_token", "embedding", embedding)
