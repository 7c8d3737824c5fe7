r"""Cross-entropy of a linear decoder, without the logits of all tokens and all words in memory.

The rounding term of Diffusion-LM (arXiv 2205.14217) and DiffuSeq (arXiv 2210.08933), and the
anchor loss of Difformer (arXiv 2212.09412): for a position i with target y and z = h E^T + b,

    loss_i = log sum_v exp z_iv - z_iy
    dL/dz_iv = g_i (p_iv - [v = y]),  p = softmax(z),  g = dL/dloss

with dL/dh = (dL/dz) E, dL/dE = (dL/dz)^T h and dL/db = sum_i dL/dz_i. A tile of logits at a time
is made, used and overwritten. The forward pass keeps two numbers a position, the largest logit m
and s = sum_v exp(z_v - m): m + log s alone would round away what p needs when logits are large.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import dispatch
from dlmone_fast.kernels.linear_cross_entropy import torch as tiles
from dlmone_fast.kernels.triton import support

_OP = "linear_cross_entropy"
_OP_BACKWARD = "linear_cross_entropy_backward"


def linear_cross_entropy(
    h: Tensor,
    embedding: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    kernel_backend: str | None = None,
) -> Tensor:
    """Cross-entropy of softmax(h E^T + b) with the targets, position by position.

    Differentiable once in h, embedding and bias; create_graph=True is refused, but for losses of
    up to 2^18 logits on a CPU, which plain torch computes. Computes in the dtypes it is given, also
    under autocast: products of 16-bit numbers add up in fp32, and the softmax is fp32. Of two
    dtypes the wider one is used; cast the table for tensor-core speed on a GPU. Deterministic.

    Args:
        h: [..., d] in fp32, fp16 or bf16, any strides.
        embedding: E [V, d] in fp32, fp16 or bf16, V >= 1, any strides.
        targets: int64 [...], in [0, V) at selected positions, anything elsewhere. CPU backends
            raise on another value; GPUs do not look, and the loss and gradients of that position
            are those of an undefined target logit.
        bias: b [V] in fp32, fp16 or bf16, or None.
        mask: [...], any dtype; positions where it is not 0 are selected. None selects all. The
            others cost nothing but their place in the result.
        kernel_backend: "triton", "torch", "auto"; default as `dispatch` says.

    Returns:
        fp32 [...]: losses in nats, 0 at positions that are not selected.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit, targets outside the vocabulary, or,
            in the backward pass, create_graph=True.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    _check(h, embedding, targets, bias, mask)
    wanted = dispatch.requested(_OP, kernel_backend)
    dtype = torch.promote_types(h.dtype, embedding.dtype)
    operands = (h.reshape(-1, h.shape[-1]).to(dtype), embedding.to(dtype), bias)
    selected = None if mask is None else (mask != 0).reshape(-1)
    where = (targets.reshape(-1), selected)
    if _is_small(operands[0], embedding, wanted):
        return tiles.plain(*operands, *where).view(targets.shape)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        losses: Tensor = _LinearCrossEntropy.apply(*operands, *where, wanted)
    else:
        losses, _, _ = _forward(*operands, *where, False, wanted)
    return losses.view(targets.shape)


def _is_small(h: Tensor, embedding: Tensor, wanted: str) -> bool:
    # A compiler could not follow the choice of rows; autograd's backward pass follows autocast.
    if h.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    torch_runs = wanted in (dispatch.AUTO, "torch")
    return torch_runs and len(h) * len(embedding) <= tiles.PLAIN_LOGITS


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Takes the arguments of `_forward` but `keep`."""
        *tensors, wanted = arguments
        # How many numbers to keep depends on the mask, which a compiler does not know.
        keep = not torch.compiler.is_compiling()
        given = [*tensors, keep, wanted]
        losses, statistics, kept = _forward(*given)
        ctx.save_for_backward(*tensors, statistics, kept)
        ctx.wanted = wanted
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dispatch.refuse_second_derivative(_OP)
        wants = [bool(needed) for needed in ctx.needs_input_grad[:3]]
        given = [gradient, *ctx.saved_tensors, *wants, ctx.wanted]
        made = _backward(*given)
        gradients = [g if wanted else None for g, wanted in zip(made, wants, strict=True)]
        return (*gradients, None, None, None)


def _run_forward(
    backend: dispatch.Backend, h: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    with _without_autocast(h.device):
        losses, statistics, kept = backend.run(h, *others[:-1])
    return losses, statistics, kept


@dispatch.operation(_OP, name="linear_cross_entropy_forward", around=_run_forward)
def _forward(
    h: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    selected: Tensor | None,
    keep: bool,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], (m, s) [2, N], and what the backend keeps for the backward pass."""
    losses = h.new_empty(len(h), dtype=torch.float32)
    statistics = h.new_empty(2, len(h), dtype=torch.float32)
    if dispatch.select(_OP, h, kernel_backend=wanted).name == "triton":
        return losses, statistics, h.new_empty(len(h) + 1, dtype=torch.int32)
    return losses, statistics, h.new_empty(0, dtype=torch.float32)


def _run_backward(
    backend: dispatch.Backend,
    gradient: Tensor,
    h: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    with _without_autocast(h.device):
        made = backend.run(gradient, h, embedding, bias, *others[:-1])
    like = (h, embedding, h if bias is None else bias)
    dh, de, db = (
        t.new_empty(0) if g is None else g.to(t.dtype) for g, t in zip(made, like, strict=True)
    )
    return dh, de, db


@dispatch.operation(_OP_BACKWARD, around=_run_backward)
def _backward(
    gradient: Tensor,
    h: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    selected: Tensor | None,
    statistics: Tensor,
    kept: Tensor,
    want_h: bool,
    want_embedding: bool,
    want_bias: bool,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, embedding and bias; an empty tensor for each that is not wanted."""
    of_bias = h if bias is None else bias
    return (
        h.new_empty(h.shape if want_h else 0),
        embedding.new_empty(embedding.shape if want_embedding else 0),
        of_bias.new_empty(len(embedding) if want_bias else 0),
    )


def _check(
    h: Tensor, embedding: Tensor, targets: Tensor, bias: Tensor | None, mask: Tensor | None
) -> None:
    if embedding.dim() != 2 or 0 in embedding.shape:
        raise UsageError(
            "linear_cross_entropy: embedding must have shape [V, d] with V, d >= 1, "
            f"got {tuple(embedding.shape)}"
        )
    v, d = embedding.shape
    if h.dim() < 1 or h.shape[-1] != d:
        raise UsageError(
            f"linear_cross_entropy: h must have shape [..., {d}] to match embedding ({v}, {d}), "
            f"got {tuple(h.shape)}"
        )
    shapes = {
        "targets": (targets, h.shape[:-1]),
        "mask": (mask, h.shape[:-1]),
        "bias": (bias, (v,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UsageError(
                f"linear_cross_entropy: {name} must have shape {tuple(shape)} for h "
                f"{tuple(h.shape)} and embedding ({v}, {d}), got {tuple(tensor.shape)}"
            )
    for name, tensor in (("h", h), ("embedding", embedding), ("bias", bias)):
        if tensor is not None:
            dispatch.check_dtype(_OP, name, tensor)
    if targets.dtype != torch.int64:
        raise UsageError(
            f"linear_cross_entropy: targets must be int64, got {targets.dtype}; "
            "convert them with .long()"
        )
    others = (("embedding", embedding), ("targets", targets), ("bias", bias), ("mask", mask))
    for name, tensor in others:
        if tensor is not None and tensor.device != h.device:
            raise UsageError(
                f"linear_cross_entropy: h is on {h.device} and {name} on {tensor.device}; "
                "move them to one device"
            )


def _kernels() -> ModuleType:
    from dlmone_fast.kernels.linear_cross_entropy import triton

    return triton


dispatch.register(
    _OP, support.backend(lambda: _kernels().forward), dispatch.in_torch(tiles.forward)
)
dispatch.register(
    _OP_BACKWARD, support.backend(lambda: _kernels().backward), dispatch.in_torch(tiles.backward)
)
