"""The network compiled by OpenVINO, on a CPU, in fp32, bf16 or int8."""

from __future__ import annotations

import importlib.util
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dlmone_fast.errors import ForkedProcessError, ModelNotLoadedError, UsageError
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.networks.backbone import at_length
from dlmone_fast.runtime.engines import openvino_graph, openvino_model
from dlmone_fast.runtime.engines.base import Engine, Runner

if TYPE_CHECKING:
    from dlmone_fast.runtime.engines.choose import EngineRequest

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
_ANY = -1
_INSTALL = "pip install 'dlmone_fast[cpu]'"

_SMALL = 1 << 27
"""Bytes of weights up to which batches of one get a compiled model of their own.

A model for any number of rows shapes its intermediate results anew. Measured at batch 1: 0.3 ms of
1.4 for 4 layers of width 128, 0.7 of 15 for 6 of 384, nothing clear for 12 of 768, where a second
copy of the weights would cost 340 MB."""


class OpenVinoEngine(Engine):
    """f(x_t, t) as OpenVINO compiles it; int8 is calibrated while this is made.

    Raises:
        UsageError: int8 was asked for and there is no example.
    """

    name: ClassVar[str] = "openvino"
    any_length: ClassVar[bool] = True

    def __init__(self, request: EngineRequest) -> None:
        self.precision = request.precision
        self.denoiser = request.denoiser
        self.time_vectors = _time_vectors(request.denoiser)
        # A compiled model's memory is free only once no runner holds a request to it.
        self._alive: weakref.WeakSet[_OpenVinoRunner] = weakref.WeakSet()
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._compiled: dict[int, Any] = {}
        self._openvino: Any = openvino_model.imported()
        backbone = self.denoiser.lm.backbone
        self._model: Any = openvino_graph.model_of(self._openvino, backbone)
        if self.precision == "int8":
            self._model = self._calibrated(request)
        self._small = sum(weight.nbytes for weight in backbone.parameters()) <= _SMALL

    def runner(self) -> Runner:
        """A new runner."""
        self.check()
        runner = _OpenVinoRunner(self)
        with self._lock:
            self._alive.add(runner)
        return runner

    def close(self) -> None:
        """Give back the compiled models."""
        with self._lock:
            self._model = None
            self._compiled.clear()
            # The engine outlives its model, to refuse later calls.
            self.denoiser = self.time_vectors = None  # type: ignore[assignment]
            for runner in self._alive:
                runner.release()

    def check(self) -> None:
        """Refuse where a call would hang or find nothing."""
        if self._model is None:
            raise ModelNotLoadedError("backend 'openvino': this model was unloaded; load it again")
        if os.getpid() != self._process:
            raise ForkedProcessError(
                "OpenVINO's threads do not survive a fork: load the model in the process that "
                "uses it, or start processes with the method 'spawn'"
            )

    def rows_of_model(self, rows: int) -> int:
        """Which compiled model serves a batch: 1, or -1 for the one that takes any."""
        return 1 if rows == 1 and self._small else _ANY

    def infer_request(self, rows: int) -> Any:
        """A new request to the compiled model of `rows_of_model`."""
        with self._lock:
            self.check()
            if rows not in self._compiled:
                self._compiled[rows] = self._compile(rows)
            return self._compiled[rows].create_infer_request()

    @property
    def tensor_class(self) -> Any:
        """`openvino.Tensor`."""
        return self._openvino.Tensor

    def _compile(self, rows: int) -> Any:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # Pinned threads of two processes would share the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        model = openvino_model.with_rows(self._model, rows, self.denoiser.config)
        return openvino_model.core().compile_model(model, "CPU", settings)

    def _calibrated(self, request: EngineRequest) -> Any:
        x_t, t = request.examples() if request.examples else (torch.empty(0), torch.empty(0))
        if not len(x_t):
            raise UsageError(
                "int8 is calibrated on examples, and there are none; pass some hundred prompts"
            )
        return openvino_model.quantized(self._model, x_t.float(), self.time_vectors[t])


class _OpenVinoRunner(Runner):
    def __init__(self, engine: OpenVinoEngine) -> None:
        self._engine = engine
        self._config = engine.denoiser.config
        self._slots: dict[int, _Slot] = {}

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        engine = self._engine
        engine.check()
        sizes, shape = self._config, tuple(x_t.shape)
        longest = sizes.seq_len
        fits = len(shape) == 3 and shape[2] == sizes.embedding_dim
        if not fits or not (longest == shape[1] or (sizes.in_slots and shape[1] < longest)):
            raise UsageError(f"x_t must be [B, {longest}, {sizes.embedding_dim}], got {shape}")
        rows = len(x_t)
        if t.shape != (rows,) or not rows:
            t = engine.denoiser.schedule.timesteps(t, x_t)
        if not rows:
            return torch.empty_like(x_t, dtype=torch.float32)
        return at_length(self._slot(rows, shape[1]).run(x_t, t), shape[1])

    def release(self) -> None:
        """Drop the requests, which keep compiled models alive."""
        self._slots.clear()

    def _slot(self, rows: int, length: int) -> _Slot:
        key = self._engine.rows_of_model(rows)
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _Slot(self._engine, key)
        slot.resize(rows, length)
        return slot


class _Slot:
    """An inference request and the memory that it reads and writes.

    OpenVINO does not keep alive what it is given, so that callers' tensors are copied, which takes
    microseconds.
    """

    def __init__(self, engine: OpenVinoEngine, key: int) -> None:
        self._request = engine.infer_request(key)
        self._tensor = engine.tensor_class
        self._config = engine.denoiser.config
        self._schedule = engine.denoiser.schedule
        self._time_vectors = engine.time_vectors
        self._shape = (0, 0)

    def resize(self, rows: int, length: int) -> None:
        """Point the request to memory for so many rows of that length."""
        if (rows, length) == self._shape:
            return
        width = self._config.embedding_dim
        slots = self._config.slots_of(length)
        self._x_t = np.empty((rows, length, width), np.float32)
        self._x0 = np.empty((rows, slots, width), np.float32)
        # An ordinary tensor even where the caller is in inference mode: later calls may not be.
        with torch.inference_mode(False):
            self._t_vector = torch.empty(rows, self._config.hidden_size)
        self._request.set_input_tensor(0, self._shared(self._x_t))
        self._request.set_input_tensor(1, self._shared(self._t_vector.numpy()))
        self._request.set_output_tensor(0, self._shared(self._x0))
        self._shape = (rows, length)

    def run(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x̂0 [B, L, d], in new memory; with a source in slots, that of the slots alone."""
        # numpy copies: threads that torch had woken would spin on OpenVINO's processors.
        np.copyto(self._x_t, x_t.detach().float().numpy())
        try:
            torch.index_select(self._time_vectors, 0, t, out=self._t_vector)
        except (IndexError, RuntimeError):
            # Checking every time would cost more than the rest of this function.
            self._schedule.timesteps(t, x_t)
            raise
        self._request.infer(share_outputs=True)
        x0 = torch.empty(self._x0.shape)
        np.copyto(x0.numpy(), self._x0)
        return x0

    def _shared(self, array: np.ndarray) -> Any:
        return self._tensor(array, shared_memory=True)


def why_not_openvino(request: EngineRequest) -> str | None:
    """None, or why OpenVINO cannot run this model here."""
    if importlib.util.find_spec("openvino") is None:
        return f"it needs OpenVINO: {_INSTALL}"
    if request.device.type != "cpu":
        return f"it runs on a CPU, and the model is on {request.device}"
    if request.precision not in _HINTS:
        return f"it has no {request.precision}; it has {', '.join(_HINTS)}"
    if request.precision == "bf16" and not _has_bf16():
        return "this processor has no bf16 instructions, and OpenVINO would compute in fp32"
    if request.precision == "int8" and importlib.util.find_spec("nncf") is None:
        return f"int8 needs nncf: {_INSTALL}"
    if request.precision == "int8" and request.examples is None:
        return "int8 is calibrated on prompts, and the model folder gives none"
    return None


def _has_bf16() -> bool:
    return "BF16" in openvino_model.core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _time_vectors(denoiser: Denoiser) -> Tensor:
    """What the network adds for each timestep: fp32 [T, H]."""
    schedule, backbone = denoiser.schedule, denoiser.lm.backbone
    with torch.inference_mode(False), torch.no_grad():
        every = schedule.network_time(torch.arange(schedule.num_timesteps))
        return backbone.time_vector(every).float()
