"""A stream of a GPU with its recordings: work that is launched once and replayed from then on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Captures of one process come one after the other: each waits for the whole device and empties
# the allocator's cache, which another one may be filling.
CAPTURING = threading.Lock()
# The first run compiles kernels and prepares tables, the second finds everything in place.
_RUNS_BEFORE_CAPTURE = 2


class CapturedCall:
    """A function's work on a lane: the same kernels on the same memory at every replay."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], None]) -> None:
        """Record what `work` launches; it must read and write memory that stays where it is."""
        # What the work reads may have been made on any stream.
        torch.cuda.synchronize(self._lane.device)
        with self._lane.entered():
            for _ in range(_RUNS_BEFORE_CAPTURE):
                work()
            self._lane.wait()
            # Other threads may go on allocating: their streams are none of this one's business.
            with torch.cuda.graph(
                self._graph,
                pool=self._lane.pool,
                stream=self._lane.stream,
                capture_error_mode="thread_local",
            ):
                work()

    def replay(self) -> None:
        """Launch the work; to be called within `Lane.entered`."""
        self._graph.replay()

    def drop(self) -> None:
        """Give the recording back."""
        self._graph.reset()


class Lane:
    """One stream and the memory that its recordings share, as they never run side by side."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()

    def call(self) -> CapturedCall:
        """An empty recording."""
        return CapturedCall(self)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within the block, what is launched runs on this lane."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    @contextmanager
    def between_callers_work(self, *results: Tensor) -> Iterator[None]:
        """`entered`, after what the caller launched before and before what it launches next."""
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with self.entered():
            yield
        caller.wait_stream(self.stream)
        for result in results:
            result.record_stream(self.stream)

    def wait(self) -> None:
        """Wait for everything launched on this lane."""
        self.stream.synchronize()

    def host_memory(self, count: int) -> Tensor:
        """int64 [count] on the CPU that copies reach without waiting."""
        return torch.empty(count, dtype=torch.int64, pin_memory=True)

    def reserved_bytes(self) -> int:
        """What torch holds of the device's memory now."""
        return torch.cuda.memory_reserved(self.device)

    def release(self) -> None:
        """Give memory that nothing uses back to the device."""
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is, or came while handling, a lack of device memory."""
    while error is not None:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return True
        # A capture that was cut short ends in a second error of its own.
        error = error.__cause__ or error.__context__
    return False
