"""Encoder-decoder transformers that write one token after another: the rival, and the teacher of
sequence-level distillation.

Public names load on first use, so that reading a command line needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlmone_fast.autoregressive.generation import Autoregressive, load_autoregressive
    from dlmone_fast.autoregressive.training import train

__all__ = ["Autoregressive", "load_autoregressive", "train"]

_HOMES = {
    "Autoregressive": "dlmone_fast.autoregressive.generation",
    "load_autoregressive": "dlmone_fast.autoregressive.generation",
    "train": "dlmone_fast.autoregressive.training",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
