"""What goes between the processes, and what LitServe is told of the endpoint: nothing but its path.

It would make a route of its own, with neither bounds nor statuses in OpenAPI.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from litserve.specs.base import LitSpec

PATH = "/generate"

Job = Mapping[str, Any]
"""A request's prompts, seed and settings, by the names of `Generator.generate`."""
Answer = dict[str, Any]
"""`status`, an HTTP status, with `texts` and, once a batch, its `rows`; or `detail`: why none."""

PROBE: Job = {
    "prompts": [""], "seed": 0, "steps": None, "temperature": None, "num_candidates": 1,
    "select": "none", "on_overflow": "error", "probe": True,
}  # fmt: skip
"""The server's own question whether a worker answers; in nobody's counts."""


def is_probe(job: Job) -> bool:
    """Whether nobody but the server asked it."""
    return bool(job.get("probe"))


class GenerateSpec(LitSpec):
    """Names the queue; `dlmone_fast.serving.routes` has the route, with its bounds and statuses."""

    def __init__(self) -> None:
        super().__init__()
        self.api_path = PATH

    def setup(self, server: Any) -> None:
        """Nothing of the server is needed in a worker."""

    def decode_request(self, request: Any, context_kwargs: Any = None) -> Any:
        """The request as it is."""
        return request

    def encode_response(self, output: Any, context_kwargs: Any = None) -> Any:
        """The answer as it is."""
        return output
