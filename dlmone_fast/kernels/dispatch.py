"""The one place where an operation is declared and its backend chosen.

An operation is declared once, as a function under `@operation`, and registers its backends in
order of preference. `select` walks that list in "auto" mode and takes the first that can run. A
backend that was asked for by name is either used or refused with `BackendUnavailableError`; only
"auto" falls back.

Precedence of the request: the `kernel_backend=` argument, then the innermost
`force_backend(...)`, then the environment variable `DLMONE_KERNEL_BACKEND`, then "auto".
The variable holds a list of backends: one for every operation ("torch"), for the operations of a
folder ("nearest_token=cpp") or for a single one ("nearest_token_with_margin=torch"). The entry that
says the most about an operation counts, in whatever order they stand.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from dlmone_fast.errors import BackendUnavailableError, UsageError

Declaration = TypeVar("Declaration", bound=Callable[..., Any])

ENVIRONMENT_VARIABLE = "DLMONE_KERNEL_BACKEND"
AUTO = "auto"

OPERATIONS: dict[str, tuple[str, ...]] = {
    "noise": ("noise", "noise_bits"),
    "forward_diffusion": ("forward_diffusion",),
    "distillation_loss": ("distillation_loss",),
    "linear_cross_entropy": ("linear_cross_entropy",),
    "blocks": ("add_layer_norm", "input_layer_norm", "bias_gelu", "bias_tanh"),
    "nearest_token": ("nearest_token", "nearest_token_with_margin"),
}
"""Operations by the folder of this package that holds them; importing it registers their backends.

A request may name a folder, which means all of its operations, or an operation. Backward passes
run on the backend of their forward pass and have no names here.
"""

BACKWARD = (
    "forward_diffusion_backward",
    "distillation_loss_gradients",
    "linear_cross_entropy_backward",
)


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    `usable` gets the operation's arguments, a tensor first, and returns None, or the reason why
    this backend cannot run on them here. `run` gets the same arguments. `automatic` says whether
    "auto" may take it: an interpreter runs only when it is named. `device` is the type of device
    that "auto" takes it on, if there is only one: others are passed over without asking `usable`.
    """

    name: str
    usable: Callable[..., str | None]
    run: Callable[..., Any]
    automatic: Callable[[], bool] = lambda: True
    device: str | None = None


def in_torch(run: Callable[..., Any]) -> Backend:
    """The backend of plain torch, which runs everywhere."""
    return Backend("torch", lambda *arguments: None, run)


_BACKENDS: dict[str, tuple[Backend, ...]] = {}
_forced: ContextVar[tuple[tuple[str | None, str], ...]] = ContextVar("dlmone_forced", default=())


def register(op: str, *backends: Backend) -> None:
    """Declare the backends of `op`, the preferred one first."""
    _BACKENDS[op] = backends


def operations() -> tuple[str, ...]:
    """Names of the operations registered so far."""
    return tuple(_BACKENDS)


def backends(op: str) -> tuple[Backend, ...]:
    """The backends of `op`, the preferred one first."""
    return _BACKENDS[op]


@contextmanager
def force_backend(name: str, op: str | None = None) -> Iterator[None]:
    """Within the block, run `op` (default: every operation) on the backend `name`.

    `op` is a key of `OPERATIONS` or a single operation. "auto" lifts an outer request. Local to
    the current thread or asyncio task.

    Raises:
        UsageError: there is no such operation.
    """
    if op is not None:
        _check_operation("force_backend", op)
    token = _forced.set(((op, name), *_forced.get()))
    try:
        yield
    finally:
        _forced.reset(token)


def operation(
    op: str, *, name: str | None = None, around: Callable[..., Any] | None = None
) -> Callable[[Declaration], Declaration]:
    """Makes a declaration an operation that runs on the backend asked for, compiled or not.

    The signature of the decorated function is the operation's list of arguments, as torch.compile
    records it: tensors, the first of which decides the device, numbers, and last `wanted`, the
    backend asked for. The function itself only makes results of the right shape, dtype, strides
    and device; a compiler plans with them (torch calls this a fake kernel). Backends compute.

    Args:
        op: the key of the backends.
        name: the operation's name in `torch.ops.dlmone_fast`; default `op`.
        around: called with the backend and all arguments where an operation does more than
            `backend.run` on all but `wanted`.
    """

    def declare(declaration: Declaration) -> Declaration:
        def run(*arguments: Any) -> Any:
            *given, wanted = arguments
            backend = select(op, *given, kernel_backend=wanted)
            return around(backend, *arguments) if around else backend.run(*given)

        # The schema is read from the annotations: `run` itself takes anything.
        schema = torch.library.infer_schema(declaration, mutates_args=())
        recorded = torch.library.custom_op(
            f"dlmone_fast::{name or op}", run, mutates_args=(), schema=schema
        )
        recorded.register_fake(declaration)

        @wraps(declaration)
        def call(*arguments: Any) -> Any:
            # A compiler cannot look into a kernel: it records the call. In eager mode that detour
            # through torch's dispatcher takes a tenth of the time of a small call, and is of use
            # only where a gradient is wanted: it refuses to differentiate what has no formula.
            if torch.compiler.is_compiling() or (
                torch.is_grad_enabled() and arguments[0].requires_grad
            ):
                return recorded(*arguments)
            return run(*arguments)

        call.custom_op = recorded  # type: ignore[attr-defined]
        return cast(Declaration, call)

    return declare


def select(op: str, *arguments: Any, kernel_backend: str | None = None) -> Backend:
    """The backend that runs `op` on these arguments.

    Raises:
        BackendUnavailableError: the backend asked for does not exist or cannot run here.
    """
    wanted = kernel_backend or requested(op)
    reasons: dict[str, str | None] = {}
    for backend in _BACKENDS[op]:
        if wanted == AUTO:
            if backend.device is not None and arguments[0].device.type != backend.device:
                continue
            if not backend.automatic():
                reasons[backend.name] = "it runs only when asked for by name"
                continue
        elif wanted != backend.name:
            continue
        reason = backend.usable(*arguments)
        if reason is None:
            return backend
        reasons[backend.name] = reason
    raise BackendUnavailableError(_refusal(op, wanted, reasons, arguments))


def requested(op: str, kernel_backend: str | None = None) -> str:
    """The name that is asked for now: what an operation hands on to its backward pass.

    The backward pass may run in another thread, where `force_backend` does not reach. Under
    `torch.compile` the request is read once, while tracing.
    """
    if kernel_backend:
        return kernel_backend
    for forced_op, name in _forced.get():
        if forced_op is None or op == forced_op or op in OPERATIONS.get(forced_op, ()):
            return name
    asked = _entries(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    return asked.get(op) or asked.get("", AUTO)


# What torch.compiler.assume_constant_result sets; that function loads the compiler, and triton.
requested._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=16)
def _entries(text: str) -> dict[str, str]:
    """Backends by operation, "" for all others, as a value of the environment variable says."""
    of_modules: dict[str, str] = {}
    of_operations: dict[str, str] = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        op, separator, name = (part.strip() for part in entry.rpartition("="))
        if separator:
            _check_operation(ENVIRONMENT_VARIABLE, op)
        if not name or op in of_operations:
            raise UsageError(
                f"{ENVIRONMENT_VARIABLE}: expected a backend for all operations, or "
                f"operation=backend, each named once, separated by commas, got {text!r}"
            )
        of_operations[op] = name
        of_modules.update(dict.fromkeys(OPERATIONS.get(op, ()), name))
    return of_modules | of_operations


def _check_operation(where: str, op: str) -> None:
    known = {*OPERATIONS, *(each for ops in OPERATIONS.values() for each in ops), *_BACKENDS}
    known.difference_update(BACKWARD)
    if op not in known:
        raise UsageError(
            f"{where}: there is no operation {op!r}; known are {', '.join(sorted(known))}"
        )


def _refusal(
    op: str, wanted: str, reasons: dict[str, str | None], arguments: tuple[Any, ...]
) -> str:
    if wanted == AUTO:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        return f"{op}: no backend can run here ({listed})"
    available = [b.name for b in _BACKENDS[op] if b.usable(*arguments) is None]
    reason = reasons.get(wanted, f"{op} has no such backend")
    return (
        f"{op}: the backend {wanted!r} was asked for and cannot run: {reason}. "
        f"Available here: {', '.join(available) or 'none'}; "
        f"or ask for {AUTO!r} (kernel_backend=, force_backend, {ENVIRONMENT_VARIABLE})."
    )


def check_dtype(op: str, name: str, tensor: Tensor) -> None:
    """Refuse dtypes that no backend computes in."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(
            f"{op}: {name} must be float32, float16 or bfloat16, got {tensor.dtype}; "
            "convert it with .float()"
        )


def refuse_second_derivative(op: str) -> None:
    """Refuse a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UsageError(
            f"{op}: its gradients cannot be differentiated again; "
            "call backward or autograd.grad without create_graph=True"
        )
