"""The arguments of forward diffusion, checked: see `kernels/forward_diffusion.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels.draws import PerRow, draws_of

_OP = "forward_diffusion"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_source(name: str, source: Tensor, dim: int, shape: str) -> None:
    if source.dim() != dim or source.shape[-1] < 1:
        raise UsageError(
            f"{_OP}: {name} must have shape {shape} with d >= 1, got {tuple(source.shape)}"
        )
    if source.dtype not in _DTYPES:
        raise UsageError(
            f"{_OP}: {name} must be float32, float16 or bfloat16, got {source.dtype}; "
            "convert it with .float()"
        )


def check_ids(ids: Tensor, embedding: Tensor) -> None:
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UsageError(f"{_OP}: ids must be integers [B, L], got {ids.dtype} {tuple(ids.shape)}")
    check_device("ids", ids, embedding.device)


def check_id_values(ids: Tensor, vocabulary: int) -> None:
    # Called where the operation runs: while a graph is traced there is nothing to read. Reading
    # ids back would stall a GPU.
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= vocabulary:
        raise UsageError(
            f"{_OP}: ids must lie in [0, {vocabulary}), the rows of embedding, "
            f"got values from {low} to {high}; tokenize with the model's own vocabulary"
        )


def check_factors(rows: int, device: torch.device, **factors: Tensor) -> None:
    for name, factor in factors.items():
        if factor.shape != (rows,) or factor.dtype != torch.float32:
            raise UsageError(
                f"{_OP}: {name} must be float32 [{rows}], one value a row, "
                f"got {factor.dtype} {tuple(factor.shape)}"
            )
        check_device(name, factor, device)
        if factor.requires_grad:
            raise UsageError(f"{_OP}: {name} gets no gradient; pass {name}.detach()")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise UsageError(
            f"{_OP}: {name} is on {tensor.device} and the data on {device}; move it there"
        )


def targets_of(mask: Tensor | None, rows: int, length: int, device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape != (rows, length) or mask.is_complex():
        raise UsageError(
            f"{_OP}: mask must be real [{rows}, {length}], 0 on source positions, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    check_device("mask", mask, device)
    return mask if mask.dtype == torch.bool else mask != 0


def draws_for(
    rows: int, seed: PerRow, sample: PerRow, step: PerRow, device: torch.device
) -> Tensor:
    draws = draws_of(seed, sample, step, device)
    if len(draws) == rows:
        return draws
    if rows == 0 and len(draws) == 1:
        return draws[:0]
    raise UsageError(
        f"{_OP}: seed, sample and step name {len(draws)} row(s) of noise for {rows} row(s) of "
        "data; give one of them an entry for each row (sample: the row's sample index)"
    )
