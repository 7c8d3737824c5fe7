"""The networks through torch.compile, on any device that it can compile for."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlmone_fast.files import prove_writable
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.runtime.engines.base import Engine, Runner
from dlmone_fast.runtime.engines.buckets import bucket_of, padded, parts_of
from dlmone_fast.runtime.engines.network import InferenceNetwork

_CPP_COMPILERS = ("g++", "clang++", "c++")


class CompileEngine(Engine):
    """f(x_t, t) compiled at its first call with each length and bucket of batch sizes.

    A compilation takes tens of seconds: worth it for many batches of one shape.

    Args:
        denoiser: the networks; a change of theirs asks for a new engine.
        precision: "fp32", "bf16" or "fp16".
    """

    name: ClassVar[str] = "compile"

    def __init__(self, denoiser: Denoiser, precision: str) -> None:
        self.precision = precision
        # Fusing and packing are the compiler's own work: what it calls it cannot fuse into.
        self.network = InferenceNetwork(denoiser, precision, fused=False, pack=False)
        self._compiled: dict[tuple[int, ...], Callable[..., Tensor]] = {}
        self._lock = threading.Lock()

    def runner(self) -> Runner:
        """A new runner."""
        return _CompileRunner(self)

    def close(self) -> None:
        """Drop the converted weights and what was compiled for them."""
        self._compiled.clear()
        del self.network

    def body(self, x_t: Tensor, time: Tensor) -> Tensor:
        """x̂0 [B, L, d] of x_t and the time embedding [B, H], B a bucket."""
        key = tuple(x_t.shape)
        compiled = self._compiled.get(key)
        if compiled is None:
            with self._lock:
                compiled = self._compiled.setdefault(key, self._compile())
                # Compiles here, where no other thread compiles.
                return compiled(self.network, x_t, time)
        return compiled(self.network, x_t, time)

    def _compile(self) -> Callable[..., Tensor]:
        on_gpu = self.network.device.type == "cuda"
        mode = "max-autotune-no-cudagraphs" if on_gpu else None
        body = _copy_of_function(InferenceNetwork.body)
        return torch.compile(body, fullgraph=True, dynamic=False, mode=mode)


class _CompileRunner(Runner):
    def __init__(self, engine: CompileEngine) -> None:
        self._engine = engine

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        time = self._engine.network.time(t)
        parts = [self._part(x_t[i:j], time[i:j]) for i, j in parts_of(len(x_t))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, x_t: Tensor, time: Tensor) -> Tensor:
        rows = len(x_t)
        bucket = bucket_of(rows)
        # Contiguous: other strides would be compiled anew.
        x_t, time = padded(x_t, bucket).contiguous(), padded(time, bucket).contiguous()
        return self._engine.body(x_t, time)[:rows]


def _copy_of_function(function: Any) -> Any:
    # torch counts recompilations by code object, gives up after a few, and shares the count among
    # all engines of a process: each compilation gets a code object of its own.
    copy = FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_compiled"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def why_not_compile(device: torch.device) -> str | None:
    """None, or why torch.compile cannot run on a device here."""
    return _why_no_compiler(device) or _why_no_cache()


def _why_no_cache() -> str | None:
    """None, or why what is compiled cannot be kept in torch's folder for it."""
    place = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    try:
        # torch's own folder is one in here.
        place = place or tempfile.gettempdir()
        prove_writable(os.path.join(place, "kept"))
    except OSError as error:
        return (
            f"torch.compile keeps what it compiles in {place or 'a temporary folder'}, which "
            f"cannot be written ({error.strerror or error}): set TORCHINDUCTOR_CACHE_DIR to a "
            "folder that can"
        )
    return None


def _why_no_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        found = importlib.util.find_spec("triton") is not None
        return None if found else "torch.compile needs triton on a GPU (pip install triton)"
    if any(shutil.which(name) for name in (os.environ.get("CXX", ""), *_CPP_COMPILERS) if name):
        return None
    return "torch.compile needs a C++ compiler on a CPU (install g++, or set CXX)"
