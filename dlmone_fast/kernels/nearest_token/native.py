"""Nearest-token rounding in C++ on CPUs (csrc/cpu/): an 8-bit or fp32 search decided in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlmone_fast.kernels import native
from dlmone_fast.kernels.nearest_token.vocabulary import Vocabulary, contiguous_rows

# The limit that csrc/bind_nearest_token.cpp sets.
_WIDEST = 1 << 20
# What a multiply-add takes in C++ on one thread: measured with VNNI at 2.5 GHz.
_PRODUCT_NS = 0.012


def usable(rows: Tensor, *others: Any) -> str | None:
    """None, or why the C++ code cannot run on rows [n, d]."""
    if rows.shape[-1] > _WIDEST:
        return f"it takes at most {_WIDEST} channels, got {rows.shape[-1]}"
    return native.why_not_on(rows)


def search(
    rows: Tensor, vocabulary: Vocabulary, with_margin: bool, path: str = ""
) -> tuple[Tensor, Tensor | None]:
    """ids [n], and margins [n] if wanted; `path` is an instruction set (default: the fastest)."""
    ids = rows.new_empty(len(rows), dtype=torch.int64)
    margins = rows.new_empty(len(rows), dtype=torch.float32) if with_margin else None
    rows, table = contiguous_rows(rows), vocabulary.prepared("fp32", contiguous_rows)
    extension = native.module()
    packed = None
    # The search reads the table rearranged for the path ("panels"). A table that is used once is
    # packed on its way through the cache instead.
    if not vocabulary.transient:
        path = path or extension.cpu_paths()[0]
        packed = vocabulary.prepared(("packed", path), lambda t: _pack(t, path))
    threads = native.threads_for(rows.numel() * len(table) * _PRODUCT_NS)
    extension.nearest_token(rows, table, ids, threads, path, margins, packed)
    return ids, margins


def _pack(table: Tensor, path: str) -> Tensor:
    """The table as the path reads it, in bytes; torch aligns them to 64."""
    size = native.module().packed_bytes(*table.shape, path)
    packed = table.new_empty(size, dtype=torch.uint8)
    native.module().pack_vocabulary(contiguous_rows(table), packed, torch.get_num_threads(), path)
    return packed
