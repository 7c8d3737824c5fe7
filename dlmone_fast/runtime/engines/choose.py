"""The one place where a generation backend is chosen.

A backend that was asked for by name runs or raises `BackendUnavailableError`; only "auto" chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dlmone_fast.errors import BackendUnavailableError, UsageError
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.runtime.engines.base import NO_ESTIMATE, Engine

BACKENDS = ("auto", "eager", "compile", "graph", "openvino")


@dataclass(frozen=True)
class EngineRequest:
    """What an engine is made of.

    Attributes:
        denoiser: the networks, on their device, frozen.
        precision: "fp32", "bf16", "fp16" or "int8".
        examples: network inputs (x_t [n, L, d], t [n]) of real prompts, for the calibration of
            int8; called only then. None: the model folder gives no prompts.
        with_estimate: calls hand over the last x̂0, as a self-conditioned teacher's do.
    """

    denoiser: Denoiser
    precision: str
    examples: Callable[[], tuple[Tensor, Tensor]] | None = None
    with_estimate: bool = False

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.denoiser.embedding.device


def make_engine(backend: str, request: EngineRequest) -> Engine:
    """The engine of a backend's name.

    Raises:
        UsageError: there is no such backend.
        BackendUnavailableError: the backend asked for cannot run this model here.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    asked = backend
    if backend == "auto":
        backend = _automatic(request)
    reason = why_unavailable(backend, request)
    if reason and asked == "auto":
        listed = "; ".join(f"{b}: {why_unavailable(b, request)}" for b in BACKENDS[1:])
        raise BackendUnavailableError(f"no backend can run {request.precision} here ({listed})")
    if reason:
        available = [b for b in BACKENDS[1:] if why_unavailable(b, request) is None]
        raise BackendUnavailableError(
            f"backend {backend!r} was asked for and cannot run: {reason}. "
            f"Available here: {', '.join(available) or 'none'}, or backend='auto'."
        )
    return _MAKERS[backend](request)


def why_unavailable(backend: str, request: EngineRequest) -> str | None:
    """None, or why a backend cannot run this model here."""
    if request.with_estimate and backend != "eager":
        return NO_ESTIMATE
    return _CHECKS[backend](request)


def survey(request: EngineRequest) -> dict[str, str]:
    """What "auto" takes, and for each backend "usable" or why not."""
    found = {backend: why_unavailable(backend, request) or "usable" for backend in BACKENDS[1:]}
    return {"auto": _automatic(request), **found}


def _automatic(request: EngineRequest) -> str:
    # Not "graph": its tests have run on a CPU's emulation of a stream only, not on a GPU.
    return "openvino" if why_unavailable("openvino", request) is None else "eager"


def _why_not_eager(request: EngineRequest) -> str | None:
    return f"it has no {request.precision}" if request.precision == "int8" else None


def _make_eager(request: EngineRequest) -> Engine:
    from dlmone_fast.runtime.engines.eager import EagerEngine

    return EagerEngine(request.denoiser, request.precision)


def _why_not_compile(request: EngineRequest) -> str | None:
    from dlmone_fast.runtime.engines.compiled import why_not_compile

    return _why_not_eager(request) or why_not_compile(request.device)


def _make_compile(request: EngineRequest) -> Engine:
    from dlmone_fast.runtime.engines.compiled import CompileEngine

    return CompileEngine(request.denoiser, request.precision)


def _why_not_graph(request: EngineRequest) -> str | None:
    from dlmone_fast.runtime.engines.graph import why_not_graph

    return why_not_graph(request.denoiser, request.precision)


def _make_graph(request: EngineRequest) -> Engine:
    from dlmone_fast.runtime.engines.graph import GraphEngine

    return GraphEngine(request.denoiser, request.precision)


def _why_not_openvino(request: EngineRequest) -> str | None:
    from dlmone_fast.runtime.engines.openvino import why_not_openvino

    return why_not_openvino(request)


def _make_openvino(request: EngineRequest) -> Engine:
    from dlmone_fast.runtime.engines.openvino import OpenVinoEngine

    return OpenVinoEngine(request)


_CHECKS: dict[str, Callable[[EngineRequest], str | None]] = {
    "eager": _why_not_eager,
    "compile": _why_not_compile,
    "graph": _why_not_graph,
    "openvino": _why_not_openvino,
}
_MAKERS: dict[str, Callable[[EngineRequest], Engine]] = {
    "eager": _make_eager,
    "compile": _make_compile,
    "graph": _make_graph,
    "openvino": _make_openvino,
}
