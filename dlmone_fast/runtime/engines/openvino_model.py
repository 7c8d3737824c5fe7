"""OpenVINO and nncf, with nothing sent, written or printed."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dlmone_fast.config import ModelConfig

# The noise's range is not the embeddings'. Left to int8, the input projection brings the agreement
# with fp32 from 99.93 % of the tokens down to 99.79 %; the output projection makes no difference.
_IN_FP32 = ".*input_projection.*"
_TELEMETRY = "openvino_telemetry"
# Quantising and hiding a module are changes to the whole process.
_LOCK = threading.RLock()
_cores: dict[int, Any] = {}


def quantized(model: Any, x_t: Tensor, t_vector: Tensor) -> Any:
    """The model with int8 products, scaled by what its layers see on examples.

    Args:
        model: an `openvino.Model` as `openvino_graph.model_of` makes it.
        x_t: inputs [n, L, d] of real prompts.
        t_vector: their times' vectors [n, H].
    """
    rows = len(x_t)
    examples = [
        (x_t[i : i + 1].numpy(force=True), t_vector[i : i + 1].numpy(force=True))
        for i in range(rows)
    ]
    with _alone(), _quiet_nncf():
        import nncf

        return nncf.quantize(
            model,
            nncf.Dataset(examples),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=rows,
            ignored_scope=nncf.IgnoredScope(patterns=[_IN_FP32]),
        )


def with_rows(model: Any, rows: int, config: ModelConfig) -> Any:
    """A copy of a model for batches of so many rows; -1: of any number. Lengths stay free where
    sources are in slots."""
    copy = model.clone()
    x_t, t_vector = copy.inputs
    length = -1 if config.in_slots else config.seq_len
    sizes = {
        x_t: [rows, length, config.embedding_dim],
        t_vector: [rows, config.hidden_size],
    }
    copy.reshape(sizes)
    return copy


def imported() -> Any:
    """The module `openvino`."""
    with _alone():
        import openvino
    return openvino


def core() -> Any:
    """The process's one `openvino.Core`, which is never let go.

    OpenVINO's CPU plugin gives the thread that creates it an alternate signal stack, and the one
    before back when it goes. Of several plugins that do not go in the order of their making one
    leaves a stack behind that is freed, and the next signal ends the process.
    """
    with _alone():
        import openvino

        process = os.getpid()
        if process not in _cores:
            # That of a process that was forked from stays as it is, without its threads.
            _cores[process] = openvino.Core()
        return _cores[process]


@contextmanager
def _alone() -> Iterator[None]:
    """One thread at a time, and nothing reported."""
    with _LOCK, without_telemetry():
        yield


@contextmanager
def without_telemetry() -> Iterator[None]:
    """OpenVINO's telemetry out of sight.

    Without a consent file, OpenVINO and nncf report their import and every conversion. Where the
    package that reports cannot be imported they use stand-ins; where somebody has imported it
    already, its entry point is replaced for as long as this lasts.
    """
    loaded: Any = sys.modules.get(_TELEMETRY)
    if loaded is None:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    else:
        original, loaded.Telemetry = loaded.Telemetry, _Silence
    try:
        yield
    finally:
        if loaded is None:
            sys.modules.pop(_TELEMETRY, None)
        else:
            loaded.Telemetry = original


class _Silence:
    """Accepts whatever is asked of a telemetry object and does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __getattr__(self, name: str) -> _Silence:
        return self

    def __call__(self, *_: object, **__: object) -> _Silence:
        return self


@contextmanager
def _quiet_nncf() -> Iterator[None]:
    """No progress bars and no notes; warnings and errors still appear."""
    import nncf
    import rich

    console, logger = rich.get_console(), logging.getLogger("nncf")
    was_quiet, level = console.quiet, logger.level
    console.quiet = True
    nncf.set_log_level(logging.WARNING)
    try:
        yield
    finally:
        console.quiet = was_quiet
        nncf.set_log_level(level)
