"""Nearest-token rounding: the vocabulary row closest to each vector in the L2 norm.

DiffuSeq (arXiv 2210.08933) rounds x_0 to tokens this way; DLM-One (arXiv 2506.00290) decodes its
one-step samples with it. Every backend returns the ids of the fp64 answer: a search in fp32 or
less finds the ids whose score could be the lowest given its rounding error, and where there are
several the fp64 distances decide (`reference.squared_distances`).

A backend's `run` gets rows [n, d] of x, any strides and the dtype of x, and a `Vocabulary`, both
on one device and checked; it returns new int64 ids [n], and with margins fp32 [n] as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import cuda_nearest_token, dispatch, native, nearest_token_torch
from dlmone_fast.kernels.triton import support
from dlmone_fast.kernels.vocabulary import Vocabulary, check_dtype, check_table, find

__all__ = ["Vocabulary", "nearest_token", "nearest_token_with_margin"]

_IDS = "nearest_token"
_MARGIN = "nearest_token_with_margin"
# The limit that csrc/bind_nearest_token.cpp sets.
_WIDEST_ON_CPU = 1 << 20
# What a multiply-add takes in C++ on one thread: measured with VNNI at 2.5 GHz.
_PRODUCT_NS = 0.012


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
    run = _ids_op if torch.compiler.is_compiling() else _run_ids
    return run(x.detach().reshape(-1, x.shape[-1]), table, handle, wanted).view(x.shape[:-1])


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
    run = _margin_op if torch.compiler.is_compiling() else _run_margin
    ids, margin = run(x.detach().reshape(-1, x.shape[-1]), table, handle, wanted)
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
    check_dtype("x", x)
    if x.device != table.device:
        raise UsageError(
            f"nearest_token: x is on {x.device} and embedding on {table.device}; "
            "move them to one device"
        )
    return table, handle


# The operations that torch.compile sees. Called directly their bodies run without the cost of
# torch's dispatcher, a tenth of the time that few tokens take on a CPU.


def _run_ids(rows: Tensor, table: Tensor, handle: int, wanted: str) -> Tensor:
    ids: Tensor = _run(_IDS, rows, table, handle, wanted)
    return ids


def _run_margin(rows: Tensor, table: Tensor, handle: int, wanted: str) -> tuple[Tensor, Tensor]:
    ids, margin = _run(_MARGIN, rows, table, handle, wanted)
    return ids, margin


def _run(op: str, rows: Tensor, table: Tensor, handle: int, wanted: str) -> Any:
    backend = dispatch.select(op, rows, table, kernel_backend=wanted)
    with torch.no_grad():
        return backend.run(rows, find(handle) or Vocabulary(table, transient=True))


_ids_op = torch.library.custom_op("dlmone_fast::nearest_token", _run_ids, mutates_args=())
_margin_op = torch.library.custom_op(
    "dlmone_fast::nearest_token_with_margin", _run_margin, mutates_args=()
)


@_ids_op.register_fake
def _(rows: Tensor, table: Tensor, handle: int, wanted: str) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.int64)


@_margin_op.register_fake
def _(rows: Tensor, table: Tensor, handle: int, wanted: str) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[0], dtype=torch.int64), rows.new_empty(
        rows.shape[0], dtype=torch.float32
    )


def _cuda(rows: Tensor, vocabulary: Vocabulary) -> Tensor:
    return _on_tensor_cores(rows, vocabulary, with_margin=False)[0]


def _cuda_with_margin(rows: Tensor, vocabulary: Vocabulary) -> Any:
    return _on_tensor_cores(rows, vocabulary, with_margin=True)


def _on_tensor_cores(
    rows: Tensor, vocabulary: Vocabulary, with_margin: bool
) -> tuple[Tensor, Tensor | None]:
    kernels = cuda_nearest_token
    dtype, roundoff = kernels.search_format(rows.dtype, vocabulary.table.dtype)
    table = vocabulary.prepared(("cuda", dtype), lambda t: kernels.search_copy(t, dtype))
    half_norms = vocabulary.prepared("cuda half norms", kernels.half_norms)
    searched = kernels.search_copy(rows, dtype)
    return kernels.run(rows, vocabulary.table, searched, table, half_norms, roundoff, with_margin)


def _cuda_proven() -> bool:
    # The kernels ran in an emulation only: until they ran on a GPU, they run when named.
    return False


def _cpp_usable(rows: Tensor, table: Tensor) -> str | None:
    if rows.shape[-1] > _WIDEST_ON_CPU:
        return f"it takes at most {_WIDEST_ON_CPU} channels, got {rows.shape[-1]}"
    return native.why_not_on(rows)


def _cpp(rows: Tensor, vocabulary: Vocabulary, path: str = "") -> Tensor:
    ids = rows.new_empty(len(rows), dtype=torch.int64)
    _call_native(rows, vocabulary, path, ids, None)
    return ids


def _cpp_with_margin(rows: Tensor, vocabulary: Vocabulary, path: str = "") -> tuple[Tensor, Tensor]:
    ids = rows.new_empty(len(rows), dtype=torch.int64)
    margin = rows.new_empty(len(rows), dtype=torch.float32)
    _call_native(rows, vocabulary, path, ids, margin)
    return ids, margin


def _call_native(
    rows: Tensor, vocabulary: Vocabulary, path: str, ids: Tensor, margins: Tensor | None
) -> None:
    rows, table = _unit_stride(rows.float()), _fp32(vocabulary)
    packed = None
    # A table that is used once is packed on its way through the cache instead.
    if not vocabulary.transient:
        path = path or native.cpu_paths()[0]
        packed = vocabulary.prepared(("packed", path), lambda t: _pack(_readable(t), path))
    threads = native.threads_for(rows.numel() * len(table) * _PRODUCT_NS)
    native.module().nearest_token(rows, table, ids, threads, path, margins, packed)


def _pack(table: Tensor, path: str) -> Tensor:
    """What the path reads in place of the table, as bytes; torch aligns them to 64."""
    size = native.module().packed_bytes(*table.shape, path)
    packed = table.new_empty(size, dtype=torch.uint8)
    native.module().pack_vocabulary(table, packed, torch.get_num_threads(), path)
    return packed


def _fp32(vocabulary: Vocabulary) -> Tensor:
    """The table in fp32, rows contiguous: the table itself where it is that already."""
    return vocabulary.prepared("fp32", _readable)


def _readable(table: Tensor) -> Tensor:
    return _unit_stride(table.float())


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _torch(rows: Tensor, vocabulary: Vocabulary) -> Tensor:
    return nearest_token_torch.run(rows.float(), _fp32(vocabulary))


def _torch_with_margin(rows: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    return nearest_token_torch.run_with_margin(rows.float(), _fp32(vocabulary))


def _triton(rows: Tensor, vocabulary: Vocabulary) -> Tensor:
    from dlmone_fast.kernels.triton import nearest_token as kernels

    return kernels.run(rows, vocabulary)


def _triton_with_margin(rows: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    from dlmone_fast.kernels.triton import nearest_token as kernels

    return kernels.run_with_margin(rows, vocabulary)


dispatch.register(
    _IDS,
    dispatch.Backend("cuda", cuda_nearest_token.usable, _cuda, _cuda_proven),
    dispatch.Backend("triton", support.usable, _triton, support.automatic),
    dispatch.Backend("cpp", _cpp_usable, _cpp),
    dispatch.Backend("torch", lambda *tensors: None, _torch),
)
dispatch.register(
    _MARGIN,
    dispatch.Backend("cuda", cuda_nearest_token.usable, _cuda_with_margin, _cuda_proven),
    dispatch.Backend("triton", support.usable, _triton_with_margin, support.automatic),
    dispatch.Backend("cpp", _cpp_usable, _cpp_with_margin),
    dispatch.Backend("torch", lambda *tensors: None, _torch_with_margin),
)
