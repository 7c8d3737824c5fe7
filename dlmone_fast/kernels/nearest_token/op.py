"""Nearest-token rounding: the vocabulary row closest to each vector in the L2 norm.

DiffuSeq (arXiv 2210.08933) rounds x_0 to tokens this way; DLM-One (arXiv 2506.00290) decodes its
one-step samples with it. Every backend returns the ids of the fp64 answer: a search in fp32 or
less finds the ids whose score could be the lowest given its rounding error, and where there are
several the fp64 distances decide (`reference.squared_distances`).

A backend's `search` gets rows [n, d] of x, any strides and the dtype of x, a `Vocabulary` on the
same device, and whether margins are wanted; it returns new int64 ids [n], and fp32 margins [n] or
None. All of it was checked.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import dispatch
from dlmone_fast.kernels.nearest_token import cuda
from dlmone_fast.kernels.nearest_token import native as cpp
from dlmone_fast.kernels.nearest_token import torch as plain
from dlmone_fast.kernels.nearest_token.vocabulary import Vocabulary, check_table, find
from dlmone_fast.kernels.triton import support

_IDS = "nearest_token"
_MARGIN = "nearest_token_with_margin"


def nearest_token(
    x: Tensor, embedding: Tensor | Vocabulary, *, kernel_backend: str | None = None
) -> Tensor:
    """ids = argmin_v |x - E_v|^2, without ever holding tokens x vocabulary numbers.

    The "torch" backend alone holds them, for as many tokens at a time as fit a cache.

    Args:
        x: [..., d] in fp32, fp16 or bf16, any strides.
        embedding: E [V, d] in fp32, fp16 or bf16, any strides, on the device of x; or a
            `Vocabulary` of it, which prepares the table once instead of at every call.
        kernel_backend: "cuda", "triton", "cpp", "torch", "auto"; default as `dispatch` says.

    Returns:
        int64 [...]: the ids by fp64 distance, the lowest id among equals. A distance that is
        not finite never wins; id 0 where no distance is finite.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    table, handle = _checked(x, embedding)
    wanted = dispatch.requested(_IDS, kernel_backend)
    rows = x.detach().reshape(-1, x.shape[-1])
    return _ids(rows, table, handle, wanted).view(x.shape[:-1])


def nearest_token_with_margin(
    x: Tensor, embedding: Tensor | Vocabulary, *, kernel_backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The ids of `nearest_token`, and how clear each choice was.

    Arguments and errors as for `nearest_token`.

    Returns:
        ids: int64 [...].
        margin: fp32 [...], the second-lowest squared distance minus the lowest, both in fp64: 0
            for equals and where no distance is finite, infinite where only one is.
    """
    table, handle = _checked(x, embedding)
    wanted = dispatch.requested(_MARGIN, kernel_backend)
    rows = x.detach().reshape(-1, x.shape[-1])
    ids, margin = _ids_and_margin(rows, table, handle, wanted)
    return ids.view(x.shape[:-1]), margin.view(x.shape[:-1])


def _checked(x: Tensor, embedding: Tensor | Vocabulary) -> tuple[Tensor, int]:
    """The table, and the handle of its vocabulary (0: none)."""
    if isinstance(embedding, Vocabulary):
        table, handle = embedding.table, embedding.handle
    else:
        check_table(embedding)
        table, handle = embedding.detach(), 0
    if x.dim() < 1 or x.shape[-1] != table.shape[1]:
        raise UsageError(
            f"nearest_token: x must have shape [..., {table.shape[1]}] to match embedding "
            f"{tuple(table.shape)}, got {tuple(x.shape)}"
        )
    dispatch.check_dtype("nearest_token", "x", x)
    if x.device != table.device:
        raise UsageError(
            f"nearest_token: x is on {x.device} and embedding on {table.device}; "
            "move them to one device"
        )
    return table, handle


def _search_ids(
    backend: dispatch.Backend, rows: Tensor, table: Tensor, handle: int, wanted: str
) -> Tensor:
    ids, _ = backend.run(rows, find(handle) or Vocabulary(table, transient=True), False)
    return ids


def _search_both(
    backend: dispatch.Backend, rows: Tensor, table: Tensor, handle: int, wanted: str
) -> tuple[Tensor, Tensor]:
    ids, margin = backend.run(rows, find(handle) or Vocabulary(table, transient=True), True)
    return ids, margin


@dispatch.operation(_IDS, around=_search_ids)
def _ids(rows: Tensor, table: Tensor, handle: int, wanted: str) -> Tensor:
    return rows.new_empty(len(rows), dtype=torch.int64)


@dispatch.operation(_MARGIN, around=_search_both)
def _ids_and_margin(rows: Tensor, table: Tensor, handle: int, wanted: str) -> tuple[Tensor, Tensor]:
    n = len(rows)
    return rows.new_empty(n, dtype=torch.int64), rows.new_empty(n, dtype=torch.float32)


def _kernels() -> ModuleType:
    from dlmone_fast.kernels.nearest_token import triton

    return triton


for _op in (_IDS, _MARGIN):
    dispatch.register(
        _op,
        dispatch.Backend("cuda", cuda.proven, cuda.search, device="cuda"),
        support.backend(lambda: _kernels().search),
        dispatch.Backend("cpp", cpp.usable, cpp.search, device="cpu"),
        dispatch.in_torch(plain.search),
    )
