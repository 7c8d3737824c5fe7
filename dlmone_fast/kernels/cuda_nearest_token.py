"""Launches the CUDA C++ kernels of nearest-token rounding (csrc/cuda/nearest_token.cu).

The search multiplies 16-bit copies of both operands on tensor cores; what it finds is decided by
fp64 distances between the operands themselves, so the ids are the fp64 answer whatever the copies
lose. Nothing here waits for the device, and every launch can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlmone_fast.kernels import native

WIDEST = 256
_OLDEST_CAPABILITY = (8, 0)
_MOST_ROWS = 1 << 30
# The kernels read rows in pieces of 16 channels, 16 bytes at a time.
_CHANNELS_PER_STEP = 16
_ALIGNMENT = 16

_SEARCHED = (torch.float16, torch.bfloat16)
_TYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def usable(x: Tensor, embedding: Tensor) -> str | None:
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


def search_format(x: torch.dtype, embedding: torch.dtype) -> tuple[torch.dtype, float]:
    """The 16-bit type to search in, and how much a copy in it can change an element (relative).

    Operands of one 16-bit type are searched as they are. Others are rounded to bf16, which has the
    range of fp32; the error bound grows by it, and more tokens need a second look.
    """
    if x == embedding and x in _SEARCHED:
        return x, 0.0
    return torch.bfloat16, 2.0**-8


def search_copy(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """matrix [n, d] as `run` searches it: 16 bits, zeros up to a multiple of 16, aligned rows.

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


def run(
    rows: Tensor,
    embedding: Tensor,
    search_rows: Tensor,
    search_table: Tensor,
    half_norms: Tensor,
    operand_roundoff: float,
    with_margin: bool,
) -> tuple[Tensor, Tensor | None]:
    """ids = argmin_v |rows - E_v|^2 on the device and current stream of `rows`.

    Args:
        rows: x [n, d] in fp32, fp16 or bf16: what distances are measured from.
        embedding: E [V, d] in fp32, fp16 or bf16: what they are measured to.
        search_rows: `search_copy(rows, dtype)`, [n, d rounded up to a multiple of 16].
        search_table: `search_copy(embedding, dtype)`, of the same type.
        half_norms: `half_norms(embedding)`, fp32 [V].
        operand_roundoff: the largest relative change of an element by its copy.
        with_margin: also measure how much further the second-nearest row is.

    Returns:
        int64 [n] ids and, with the margin, fp32 [n]; else None. Ties, non-finite distances and
        margins as `nearest_token_with_margin` says.
    """
    rows, embedding = _unit_stride(rows), _unit_stride(embedding)
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
            half_norms=half_norms.data_ptr(),
            operand_roundoff=operand_roundoff,
            ids=ids.data_ptr(),
            margins=margin.data_ptr() if margin is not None else 0,
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace_bytes,
            multiprocessors=multiprocessors,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
    return ids, margin


def search(x: Tensor, embedding: Tensor, with_margin: bool = False) -> tuple[Tensor, Tensor | None]:
    """`run` for x [n, d] with copies and half norms made on the spot."""
    dtype, roundoff = search_format(x.dtype, embedding.dtype)
    return run(
        x,
        embedding,
        search_copy(x, dtype),
        search_copy(embedding, dtype),
        half_norms(embedding),
        roundoff,
        with_margin,
    )


def _is_aligned(matrix: Tensor) -> bool:
    bytes_per_row = matrix.stride(0) * matrix.element_size()
    return (
        matrix.stride(1) == 1
        and bytes_per_row % _ALIGNMENT == 0
        and matrix.data_ptr() % _ALIGNMENT == 0
    )


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
