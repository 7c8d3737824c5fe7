"""Noise in C++ on CPUs (csrc/cpu/noise_*.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from dlmone_fast.kernels import native

NORMAL_NS = 4.3
"""Time of one normal number in C++ on one thread, measured on AVX-512 at 2.5 GHz."""


def normal(draws: Tensor, stream: int, positions: int, channels: int, path: str = "") -> Tensor:
    """fp32 [B, positions, channels]; `path` names an instruction set (default: the fastest)."""
    draws = draws.contiguous()
    out = draws.new_empty(len(draws), positions, channels, dtype=torch.float32)
    threads = native.threads_for(out.numel() * NORMAL_NS)
    native.module().normal(draws, stream, out, threads, path)
    return out


def words(draws: Tensor, stream: int, first: int, count: int, path: str = "") -> Tensor:
    """int64 [B, count, 4]."""
    draws = draws.contiguous()
    out = draws.new_empty(len(draws), count, 4)
    threads = native.threads_for(out.numel() * NORMAL_NS)
    native.module().philox_words(draws, stream, first, out, threads, path)
    return out
