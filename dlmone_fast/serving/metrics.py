"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60, 300)
_ROWS = tuple(2**i for i in range(13))


class Metrics:
    """Counters of one HTTP process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "dlmone_requests", "Requests to /generate by the status of the answer", ["status"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "dlmone_request_seconds", "From a request's first byte to its answer", ["status"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.rows = Histogram(
            "dlmone_batch_rows", "Rows (prompts times candidates) that were generated together",
            buckets=_ROWS, registry=self.registry,
        )  # fmt: skip
        self.prompts = Counter(
            "dlmone_prompts", "Prompts that were answered", registry=self.registry
        )
        self.lost_workers = Counter(
            "dlmone_requests_lost_with_worker", "Requests whose worker process ended",
            registry=self.registry,
        )  # fmt: skip

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def answered(self, status: int, seconds: float) -> None:
        """Count an answer."""
        self.requests.labels(str(status)).inc()
        self.seconds.labels(str(status)).observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
