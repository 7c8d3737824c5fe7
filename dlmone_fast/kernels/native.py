"""The compiled extension `dlmone_fast._C`: loaded on first use, and why it is missing if it is."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dlmone_fast.errors import BackendUnavailableError

if TYPE_CHECKING:
    from torch import Tensor

_MODULE = "dlmone_fast._C"
# How the extension reads tensors: DLPack's interface for C.
_EXCHANGE = "__dlpack_c_exchange_api__"
# The limit that csrc/bindings.h sets.
_MOST_THREADS = 1024
# Less than this is over before a team of threads pays for being woken; its threads then go on to
# spin for a while, at the cost of whatever library computes next.
_WORTH_A_TEAM_NS = 1e6
_BUILD_NOTE = Path(__file__).resolve().parent.parent / "_native_build.txt"


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    import torch

    if not hasattr(torch.Tensor, _EXCHANGE):
        return None, f"torch {torch.__version__} has no {_EXCHANGE}; install torch 2.10 or newer"
    try:
        return importlib.import_module(_MODULE), None
    except ImportError as error:
        return None, _explain(error)


def _explain(error: ImportError) -> str:
    return _build_note() or (
        f"{_MODULE} could not be imported ({error}); "
        "reinstall with a C++17 compiler at hand: pip install --force-reinstall --no-deps ."
    )


def _build_note() -> str:
    """The line that setup.py leaves when it could not build all, or was told not to."""
    return _BUILD_NOTE.read_text(encoding="utf-8").strip() if _BUILD_NOTE.is_file() else ""


def is_available() -> bool:
    """Whether the extension was built and loads."""
    return _load()[0] is not None


def why_missing() -> str | None:
    """One line saying why the extension cannot be used, or None when it can."""
    return _load()[1]


def threads_for(nanoseconds: float) -> int:
    """Threads for work that takes one of them about so long: one, or as many as torch uses."""
    import torch

    return torch.get_num_threads() if nanoseconds >= _WORTH_A_TEAM_NS else 1


def why_not_on(tensor: Tensor, *others: Any) -> str | None:
    """One line saying why the CPU code cannot run on the tensor, or None when it can."""
    if tensor.device.type != "cpu":
        return f"it runs on CPU tensors, not on {tensor.device.type}"
    import torch

    threads = torch.get_num_threads()
    if threads > _MOST_THREADS:
        return f"it takes at most {_MOST_THREADS} threads, and torch.set_num_threads set {threads}"
    return why_missing()


def module() -> ModuleType:
    """The extension.

    Raises:
        BackendUnavailableError: it was not built or does not load; the message says why.
    """
    extension, reason = _load()
    if extension is None:
        raise BackendUnavailableError(f"the native extension is not available: {reason}")
    return extension


def cpu_paths() -> tuple[str, ...]:
    """Instruction-set paths this CPU can run, the fastest first; empty without the extension."""
    return tuple(module().cpu_paths()) if is_available() else ()


def cuda_report() -> str:
    """One line on the CUDA part of the extension, for the `doctor` command."""
    if not is_available():
        return f"no CUDA part: {why_missing()}"
    extension = module()
    if not extension.built_with_cuda:
        reason = _build_note() or "built without nvcc"
        return f"no CUDA part: {reason} (set DLMONE_CUDA=ON and reinstall to require it)"
    version = extension.cuda_runtime_version()
    count, error = extension.cuda_device_count()
    devices = f"{count} device(s)" if error is None else f"no device ({error})"
    return f"CUDA runtime {version // 1000}.{version % 1000 // 10}, {devices}"
