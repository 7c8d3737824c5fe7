"""When the Triton backend can run, and how a launch configuration is written down.

Does not import triton: asking costs nothing where it is not installed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.kernels.dispatch import Backend

_OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Build:
    """A kernel in one configuration that launches use: what the ahead-of-time check compiles.

    Attributes:
        kernel: the @triton.jit function.
        signature: Triton types of the arguments that are not constants ("*bf16", "i32", "fp32").
        constants: values of the constexpr arguments.
        num_warps, num_stages: as at launch.
        multiples_of_16: integer arguments that are divisible by 16 in practice; pointers always
            count as aligned. Without this the compiler's register use is not the launch's.
        options: further compiler options as at launch (enable_fp_fusion, maxnreg).
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    multiples_of_16: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def build(
    kernel: Any, constants: Mapping[str, Any], types: Mapping[str, str], **launch: Any
) -> Build:
    """A `Build` of pointers to fp32 (arguments `..._ptr`) and i32 numbers, but for `types`.

    `types` may name arguments of other kernels, too; `launch` holds the further fields of `Build`.
    """
    names = [name for name in kernel.arg_names if name not in constants]
    usual = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    signature = {name: types.get(name, kind) for name, kind in usual.items()}
    return Build(kernel, signature, constants, **launch)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: exact and very slow."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def backend(kernel: Callable[[], Callable[..., Any]]) -> Backend:
    """The Triton backend that runs the function which `kernel()` gives.

    Called late, so that triton, which takes a second to import, is imported on first use only.
    """
    return Backend(
        "triton",
        usable,
        lambda *given, **named: kernel()(*given, **named),
        # Not in its interpreter, which exists for tests.
        automatic=lambda: not interpreting(),
        device="cuda",
    )


def usable(first: Tensor, *others: Any) -> str | None:
    """None, or why Triton cannot run on the tensor here."""
    if not _installed():
        return "triton is not installed (pip install triton)"
    device = first.device
    if interpreting():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs kernels on CPU tensors"
    if device.type != "cuda":
        return f"it runs on CUDA tensors, not on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"it needs compute capability 8.0 or newer, and {device} has {found}"
    return None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, which Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
