"""The transformer's element-by-element steps, fused for inference: forward passes only.

Each operation reads its inputs once and writes its result once. Sums and statistics are taken
in fp32, and a row of equal values gives the bias exactly whatever eps is.

The Triton backend normalises centred values: a large mean costs no accuracy. The torch backend is
torch's layer_norm, which on CPUs scales before it takes the mean away: an error of up to 3e-7
|mean| / std in a normalised value (3e-3 where the mean is 10^4 standard deviations; more in rows of
fewer than 100 numbers). Taking the mean away first would cost a third of the operation's time.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import dispatch
from dlmone_fast.kernels.blocks import torch as plain
from dlmone_fast.kernels.triton import support

ADD_LAYER_NORM = "add_layer_norm"
INPUT_LAYER_NORM = "input_layer_norm"
BIAS_GELU = "bias_gelu"
BIAS_TANH = "bias_tanh"
WIDEST_NORM = 4096


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    return_sum: bool = False,
    kernel_backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(x + residual) over the last dimension.

    Args:
        x: [..., H] in fp32, fp16 or bf16, 1 <= H <= 4096. Rows may have any stride; other layouts
            are copied.
        residual: shape, dtype and device of x.
        weight, bias: [H], of one dtype: that of x, or fp32.
        eps: added to the variance, > 0.
        return_sum: also return x + residual, rounded to the dtype of x. The norm is that of the
            unrounded sum.
        kernel_backend: "triton", "torch", "auto"; default as `dispatch` says.

    Returns:
        The normalised sum [..., H] in the dtype of x, or (that, the sum).

    Raises:
        UsageError: shapes, dtypes, devices or values that do not fit, or a gradient is wanted.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    _check_x(ADD_LAYER_NORM, "x", x, WIDEST_NORM)
    _check_like(ADD_LAYER_NORM, "residual", residual, x, tuple(x.shape), (x.dtype,))
    _check_norm(ADD_LAYER_NORM, x, weight, bias, eps)
    _check_no_gradient(ADD_LAYER_NORM, x, residual, weight, bias)
    wanted = dispatch.requested(ADD_LAYER_NORM, kernel_backend)
    normed, total = _add_layer_norm(x, residual, weight, bias, eps, return_sum, wanted)
    return (normed, total) if return_sum else normed


def input_layer_norm(
    projected: Tensor,
    position: Tensor,
    time: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    kernel_backend: str | None = None,
) -> Tensor:
    """LayerNorm(projected + position + time): what enters the first transformer block.

    Args:
        projected: [B, L, H] in fp32, fp16 or bf16, 1 <= H <= 4096.
        position: at least L rows of [H], of the dtype of weight; the first L are used.
        time: [B, H] in the dtype of projected.
        weight, bias, eps, kernel_backend: as for `add_layer_norm`.

    Returns:
        [B, L, H] in the dtype of projected.

    Raises:
        UsageError: shapes, dtypes, devices or values that do not fit, or a gradient is wanted.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    op = INPUT_LAYER_NORM
    if projected.dim() != 3:
        raise UsageError(f"{op}: projected must have shape [B, L, H], got {tuple(projected.shape)}")
    _check_x(op, "projected", projected, WIDEST_NORM)
    batch, length, hidden = projected.shape
    _check_norm(op, projected, weight, bias, eps)
    if position.dim() != 2 or position.shape[0] < length or position.shape[1] != hidden:
        raise UsageError(
            f"{op}: position must have shape [L, {hidden}] with L >= {length} to match projected "
            f"{tuple(projected.shape)}, got {tuple(position.shape)}"
        )
    _check_like(op, "position", position, projected, tuple(position.shape), (weight.dtype,))
    _check_like(op, "time", time, projected, (batch, hidden), (projected.dtype,))
    _check_no_gradient(op, projected, position, time, weight, bias)
    wanted = dispatch.requested(op, kernel_backend)
    return _input_layer_norm(projected, position, time, weight, bias, eps, wanted)


def bias_gelu(x: Tensor, bias: Tensor, *, kernel_backend: str | None = None) -> Tensor:
    """GELU(x + bias) in its exact form, v (1 + erf(v / sqrt 2)) / 2.

    Args:
        x: [..., H] in fp32, fp16 or bf16, H >= 1. Rows may have any stride; other layouts are
            copied.
        bias: [H] in the dtype of x, or fp32.
        kernel_backend: "triton", "torch", "auto"; default as `dispatch` says.

    Returns:
        [..., H] in the dtype of x.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit, or a gradient is wanted.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    _check_activation(BIAS_GELU, x, bias)
    return _bias_gelu(x, bias, dispatch.requested(BIAS_GELU, kernel_backend))


def bias_tanh(x: Tensor, bias: Tensor, *, kernel_backend: str | None = None) -> Tensor:
    """tanh(x + bias), to a few units in the last place of fp32 also near 0.

    Arguments, result and errors as for `bias_gelu`.
    """
    _check_activation(BIAS_TANH, x, bias)
    return _bias_tanh(x, bias, dispatch.requested(BIAS_TANH, kernel_backend))


@dispatch.operation(ADD_LAYER_NORM)
def _add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    return_sum: bool,
    wanted: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if return_sum else 0)


@dispatch.operation(INPUT_LAYER_NORM)
def _input_layer_norm(
    projected: Tensor,
    position: Tensor,
    time: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    wanted: str,
) -> Tensor:
    return projected.new_empty(projected.shape)


@dispatch.operation(BIAS_GELU)
def _bias_gelu(x: Tensor, bias: Tensor, wanted: str) -> Tensor:
    return x.new_empty(x.shape)


@dispatch.operation(BIAS_TANH)
def _bias_tanh(x: Tensor, bias: Tensor, wanted: str) -> Tensor:
    return x.new_empty(x.shape)


def _check_x(op: str, name: str, x: Tensor, widest: int | None) -> None:
    if x.dim() < 1 or x.shape[-1] == 0 or (widest is not None and x.shape[-1] > widest):
        limit = "H >= 1" if widest is None else f"1 <= H <= {widest}"
        raise UsageError(
            f"{op}: {name} must have shape [..., H] with {limit}, got {tuple(x.shape)}"
        )
    dispatch.check_dtype(op, name, x)


def _check_like(
    op: str,
    name: str,
    tensor: Tensor,
    x: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if tuple(tensor.shape) != shape:
        raise UsageError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise UsageError(f"{op}: {name} must be {allowed} here, got {tensor.dtype}; convert it")
    if tensor.device != x.device:
        raise UsageError(
            f"{op}: {name} is on {tensor.device}, the first argument on {x.device}; "
            "move them to one device"
        )


def _check_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    _check_like(op, "weight", weight, x, (x.shape[-1],), (x.dtype, torch.float32))
    _check_like(op, "bias", bias, x, (x.shape[-1],), (weight.dtype,))
    # Its inverse root must be an fp32 number.
    if not 1e-30 <= eps < float("inf"):
        raise UsageError(f"{op}: eps must lie in [1e-30, inf), got {eps}")


def _check_activation(op: str, x: Tensor, bias: Tensor) -> None:
    _check_x(op, "x", x, None)
    _check_like(op, "bias", bias, x, (x.shape[-1],), (x.dtype, torch.float32))
    _check_no_gradient(op, x, bias)


def _check_no_gradient(op: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise UsageError(
            f"{op}: an argument requires a gradient, and this operation has none; run it under "
            "torch.inference_mode(), or train with torch.nn.functional"
        )


def _kernels() -> ModuleType:
    from dlmone_fast.kernels.blocks import triton

    return triton


for _op in (ADD_LAYER_NORM, INPUT_LAYER_NORM, BIAS_GELU, BIAS_TANH):
    # Functions of the backends bear the operations' names.
    dispatch.register(
        _op,
        support.backend(lambda op=_op: getattr(_kernels(), op)),  # type: ignore[misc]
        dispatch.in_torch(getattr(plain, _op)),
    )
