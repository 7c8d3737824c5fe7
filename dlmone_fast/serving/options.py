"""What the server is told; the command's options are these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dlmone_fast.checks import as_real
from dlmone_fast.errors import UsageError

_BOUNDS: dict[str, tuple[float, float]] = {
    "port": (1024, 65535),
    "max_batch_size": (1, 4096),
    "batch_timeout_ms": (0, 10_000),
    "max_queued": (0, 100_000),
    "timeout_s": (0.1, 3600),
    "max_prompts": (1, 4096),
    "max_prompt_chars": (1, 10_000_000),
    "max_body": (64, 1 << 30),
    "max_candidates": (1, 64),
    "max_rows": (1, 1 << 20),
}


@dataclass(frozen=True)
class ServeOptions:
    """Options of the command."""

    model: str
    """Model folder."""
    host: str = "127.0.0.1"
    """Address of this machine, or its name, to listen at; 0.0.0.0: every network of it."""
    port: int = 8000
    """Port to listen at."""
    max_batch_size: int = 32
    """Rows (prompts times candidates) a network call."""
    batch_timeout_ms: float = 5.0
    """Milliseconds that a first request waits for others to share its batch."""
    max_queued: int = 256
    """Requests that may wait beside one batch that is served; the next one gets 429."""
    timeout_s: float = 20.0
    """Seconds that a request may take from its first byte to its answer; then it gets 504. A
    server that is told to stop waits as long for the requests that it has accepted."""
    max_prompts: int = 32
    """Prompts a request."""
    max_prompt_chars: int = 20_000
    """Characters a prompt; the model may allow fewer."""
    max_body: int = 1 << 20
    """Bytes of a request's body; more get 413."""
    max_candidates: int = 16
    """Candidates a prompt."""
    max_rows: int = 256
    """Network rows a request: prompts times candidates times steps."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs if there are any, with a worker each."""
    dtype: str = "auto"
    """auto (fp32 on a CPU, bf16 on a GPU), fp32, bf16 or fp16."""
    backend: str = "auto"
    """What runs the network: auto, eager, compile, graph (CUDA) or openvino (CPU)."""

    def check(self) -> None:
        """Raise UsageError for a number that is out of its bounds."""
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            number = as_real(value)
            if number is None or not low <= number <= high:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag}: expected {low:,} to {high:,}, got {value!r}")
        if self.batch_timeout_ms >= 1000 * self.timeout_s:
            raise UsageError(
                f"--batch-timeout-ms: expected less than --timeout-s ({self.timeout_s:g} s), "
                f"got {self.batch_timeout_ms:g} ms"
            )

    @property
    def max_in_flight(self) -> int:
        """Requests that may be accepted and not yet answered."""
        return self.max_batch_size + self.max_queued
