"""Ways of running the network: the one place that chooses between them is `choose.py`."""

from dlmone_fast.runtime.engines.base import Engine, Runner
from dlmone_fast.runtime.engines.choose import (
    BACKENDS,
    EngineRequest,
    make_engine,
    survey,
    why_unavailable,
)

__all__ = [
    "BACKENDS",
    "Engine",
    "EngineRequest",
    "Runner",
    "make_engine",
    "survey",
    "why_unavailable",
]
