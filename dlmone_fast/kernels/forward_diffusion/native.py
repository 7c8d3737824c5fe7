"""Forward diffusion in C++ on CPUs, fp32 (csrc/cpu/noise_*.cpp): the noise is made on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlmone_fast.kernels import native
from dlmone_fast.kernels.noise.native import NORMAL_NS


def usable(x: Tensor, *others: Any) -> str | None:
    """None, or why the C++ code cannot run on x."""
    if x.device.type == "cpu" and x.dtype != torch.float32:
        return f"it computes in float32, not in {x.dtype}"
    return native.why_not_on(x)


def forward_diffusion(
    source: Tensor,
    ids: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    targets: Tensor | None,
    draws: Tensor,
    stream: int,
    path: str = "",
) -> Tensor:
    """x_t [B, L, d]; `path` names an instruction set (default: the fastest)."""
    shape = source.shape if ids is None else (*ids.shape, source.shape[-1])
    out = source.new_empty(shape)
    native.module().forward_diffusion(
        draws=draws.contiguous(),
        stream=stream,
        x0=source.contiguous(),
        ids=None if ids is None else ids.contiguous(),
        alpha=alpha.contiguous(),
        sigma=sigma.contiguous(),
        mask=None if targets is None else targets.contiguous(),
        out=out,
        threads=native.threads_for(out.numel() * NORMAL_NS),
        path=path,
    )
    return out
