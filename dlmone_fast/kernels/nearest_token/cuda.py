"""Nearest-token rounding in CUDA C++ (csrc/cuda/nearest_token.cu): its launches and self-test.

The search multiplies 16-bit copies of both operands on tensor cores; what it finds is decided by
fp64 distances between the operands themselves, so the ids are the fp64 answer whatever the copies
lose. A search never waits for the device, and every launch can be captured in a CUDA graph.

The first use on a device is preceded by a self-test, which waits: a device is trusted when the
kernels gave the reference's ids and margins on it.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.kernels import native
from dlmone_fast.kernels.nearest_token import reference
from dlmone_fast.kernels.nearest_token.vocabulary import Vocabulary

WIDEST = 256
_OLDEST_CAPABILITY = (8, 0)
_MOST_ROWS = 1 << 30
# The kernels read rows in pieces of 16 channels, 16 bytes at a time.
_CHANNELS_PER_STEP = 16
_ALIGNMENT = 16

_SEARCHED = (torch.float16, torch.bfloat16)
_TYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# The self-test: tokens, rows of the table, channels, types of x and of the table. Every search type
# with and without rounding, one and several splits, widths that are padded and the widest.
_CASES = (
    (1, 3, 5, torch.float32, torch.float16),
    (7, 130, 20, torch.float16, torch.float16),
    (33, 300, 128, torch.bfloat16, torch.bfloat16),
    (9, 4000, 64, torch.float32, torch.float32),
    (5, 90, 256, torch.bfloat16, torch.float32),
)
_tested: dict[torch.device, str | None] = {}
_testing = threading.Lock()


def usable(x: Tensor, embedding: Tensor, *others: Any) -> str | None:
    """None, or why the kernels cannot run on x [..., d] and embedding [V, d] here."""
    if x.device.type != "cuda":
        return f"it runs on CUDA tensors, not on {x.device.type}"
    if not native.is_available():
        return native.why_missing()
    if not native.module().built_with_cuda:
        return "the native extension was built without CUDA (set DLMONE_CUDA=ON and reinstall)"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < _OLDEST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"it needs compute capability 8.0 or newer, and {x.device} has {found}"
    if embedding.shape[1] > WIDEST:
        return f"it takes at most {WIDEST} channels, got {embedding.shape[1]}"
    if max(x.shape[:-1].numel(), len(embedding)) > _MOST_ROWS:
        return f"it takes at most {_MOST_ROWS} rows"
    return None


def proven(x: Tensor, embedding: Tensor, *others: Any) -> str | None:
    """None, or why the kernels cannot run here or must not: see `self_test`."""
    return usable(x, embedding) or self_test(x.device)


def search_format(x: torch.dtype, embedding: torch.dtype) -> tuple[torch.dtype, float]:
    """The 16-bit type to search in, and how much a copy in it can change an element (relative).

    Operands of one 16-bit type are searched as they are. Others are rounded to bf16, which has the
    range of fp32; the error bound grows by it, and more tokens need a second look.
    """
    if x == embedding and x in _SEARCHED:
        return x, 0.0
    return torch.bfloat16, 2.0**-8


def search_copy(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """matrix [n, d] as `search` reads it: 16 bits, zeros up to a multiple of 16, aligned rows.

    The matrix itself where it is all that already.
    """
    n, d = matrix.shape
    padding = -d % _CHANNELS_PER_STEP
    if matrix.dtype == dtype and not padding and _is_aligned(matrix):
        return matrix
    copy = torch.empty(n, d + padding, dtype=dtype, device=matrix.device)
    copy[:, :d] = matrix
    copy[:, d:] = 0
    return copy


def half_norms(embedding: Tensor) -> Tensor:
    """|E_v|^2 / 2 in fp32 [V], of the embedding itself and not of its copy."""
    return embedding.float().square().sum(-1).mul_(0.5)


def search(rows: Tensor, vocabulary: Vocabulary, with_margin: bool) -> tuple[Tensor, Tensor | None]:
    """ids = argmin_v |rows - E_v|^2 on the device and current stream of `rows`.

    Args:
        rows: x [n, d] in fp32, fp16 or bf16, on the device of the vocabulary.
        vocabulary: of E [V, d]; its 16-bit copy and half norms are made once.
        with_margin: also measure how much further the second-nearest row is.

    Returns:
        int64 [n] ids and, with the margin, fp32 [n]; else None. Ties, non-finite distances and
        margins as `nearest_token_with_margin` says.
    """
    dtype, operand_roundoff = search_format(rows.dtype, vocabulary.table.dtype)
    search_table = vocabulary.prepared(("cuda", dtype), lambda t: search_copy(t, dtype))
    norms = vocabulary.prepared("cuda half norms", half_norms)
    search_rows = search_copy(rows, dtype)
    rows, embedding = _unit_stride(rows), _unit_stride(vocabulary.table)
    device = rows.device
    ids = torch.empty(len(rows), dtype=torch.int64, device=device)
    margin = torch.empty(len(rows), dtype=torch.float32, device=device) if with_margin else None
    shape = {"n": len(rows), "v": len(embedding), "d": rows.shape[1]}
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    with torch.cuda.device(device):
        extension = native.module()
        workspace_bytes = extension.cuda_nearest_token_workspace(
            **shape, multiprocessors=multiprocessors
        )
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        extension.cuda_nearest_token(
            **shape,
            x=rows.data_ptr(),
            x_type=_TYPE_CODES[rows.dtype],
            x_stride=rows.stride(0),
            embedding=embedding.data_ptr(),
            embedding_type=_TYPE_CODES[embedding.dtype],
            embedding_stride=embedding.stride(0),
            search_x=search_rows.data_ptr(),
            search_x_stride=search_rows.stride(0),
            search_table=search_table.data_ptr(),
            search_table_stride=search_table.stride(0),
            search_type=_TYPE_CODES[search_table.dtype],
            half_norms=norms.data_ptr(),
            operand_roundoff=operand_roundoff,
            ids=ids.data_ptr(),
            margins=margin.data_ptr() if margin is not None else 0,
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace_bytes,
            multiprocessors=multiprocessors,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
    return ids, margin


def self_test(device: torch.device) -> str | None:
    """None, or how the kernels failed on this device when they were tried there first."""
    with _testing:
        if device not in _tested:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return (
                    f"its self-test on {device} has not run and cannot while a CUDA graph is "
                    "captured; call nearest_token once before the capture"
                )
            _tested[device] = _failure(device)
        return _tested[device]


def _failure(device: torch.device) -> str | None:
    for tokens, rows, width, x_type, table_type in _CASES:
        x, table = _numbers(tokens, width, 0).to(x_type), _numbers(rows, width, 1).to(table_type)
        # Equal rows far from each other, one of which is nearest to the first token, and a row
        # that must never win.
        table[-1] = table[0]
        table[1, 0] = torch.nan
        x[0] = table[0]
        expected = reference.nearest_token(x, table), reference.margin(x, table).float()
        try:
            on_device = x.to(device), Vocabulary(table.to(device), transient=True)
            ids, margin = search(*on_device, True)
            found = ids, margin, search(*on_device, False)[0]
            right = all(
                isinstance(a, Tensor) and torch.equal(a.cpu(), b)
                for a, b in zip(found, (*expected, expected[0]), strict=True)
            )
        except torch.OutOfMemoryError:
            # Says nothing of the kernels: the next call tries again.
            raise
        except Exception as error:
            return f"its self-test on {device} failed: {type(error).__name__}: {error}"
        if not right:
            return (
                f"its self-test on {device} failed: ids or margins of {tokens} tokens in {x_type} "
                f"and a table of {rows} x {width} in {table_type} are not the reference's"
            )
    return None


def _numbers(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float32, device="cpu")


def _is_aligned(matrix: Tensor) -> bool:
    bytes_per_row = matrix.stride(0) * matrix.element_size()
    return (
        matrix.stride(1) == 1
        and bytes_per_row % _ALIGNMENT == 0
        and matrix.data_ptr() % _ALIGNMENT == 0
    )


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
