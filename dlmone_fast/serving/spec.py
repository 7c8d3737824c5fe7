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
