"""How much memory the process holds."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import pytest

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Bytes of this process in RAM, after what is free was given back to the system."""
    if not _STATM.exists():
        pytest.skip("what a process holds is read from Linux's /proc")
    gc.collect()
    # glibc's alone; others give back by themselves.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
