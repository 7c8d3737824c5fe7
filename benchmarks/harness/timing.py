"""Time and memory of one call, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

# As mallopt numbers them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


class Stopwatch:
    """Times single calls. On a GPU: from a flushed second-level cache, by events on the stream.

    The flush takes the GPU longer than a call takes the CPU to issue, so that what is timed is
    the GPU's work wherever the CPU can keep ahead of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(max(4 * cache, 1 << 28), dtype=torch.uint8, device=device)

    def time(self, call: Call) -> float:
        """Seconds of one call."""
        if self._flush is None:
            started = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - started
            del result
            return seconds
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def best(self, call: Call, rounds: int) -> float:
        """The shortest of several calls, after one that does not count."""
        call()
        return min(self.time(call) for _ in range(rounds))


class WallClock(Stopwatch):
    """Times whole calls: what the CPU does counts, and a GPU has finished before and after."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cpu"))
        self.device = device

    def time(self, call: Call) -> float:
        """Seconds of one call."""
        if self.device.type != "cuda":
            return super().time(call)
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        result = call()
        torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        del result
        return seconds


def held_memory(call: Call, device: torch.device) -> tuple[Any, int | None]:
    """The result of a first call, and the bytes of GPU memory that are kept after it.

    CUDA graphs keep their intermediate results' memory from the call that records them to the
    next ones, where `peak_memory` does not see it. None on a CPU.
    """
    if device.type != "cuda":
        return call(), None
    before = _reserved(device)
    result = call()
    return result, max(0, _reserved(device) - before)


def _reserved(device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes in use at the worst moment of a call beyond those before it, its result included.

    A GPU's from torch's allocator. A CPU's from the kernel's record of resident memory, which
    sees every library's allocations; None where the kernel keeps no such record.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    # Every large block on pages of its own, returned when it is freed: blocks that the C library
    # keeps to hand out again would hide what a call uses, or count it twice.
    _keep_free_blocks(below=1 << 16)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None
    finally:
        # The C library's own adjustment ends here in a process that uses much memory.
        _keep_free_blocks(below=1 << 25)


def _keep_free_blocks(below: int) -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.mallopt(_MMAP_THRESHOLD, below)
        library.mallopt(_TRIM_THRESHOLD, 2 * below)
        library.malloc_trim(0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
