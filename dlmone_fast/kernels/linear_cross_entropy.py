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

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import dispatch
from dlmone_fast.kernels import linear_cross_entropy_torch as tiles
from dlmone_fast.kernels.triton import support

_OP = "linear_cross_entropy"
_OP_BACKWARD = "linear_cross_entropy_backward"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    where = (targets.reshape(-1), selected, wanted)
    if _is_small(operands[0], embedding, wanted):
        return tiles.run_plain(*operands, *where[:2]).view(targets.shape)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        losses: Tensor = _LinearCrossEntropy.apply(*operands, *where)
    else:
        losses = _op(_forward, _run_forward)(*operands, *where, False)[0]
    return losses.view(targets.shape)


def _is_small(h: Tensor, embedding: Tensor, wanted: str) -> bool:
    # A compiler could not follow the choice of rows; autograd's backward pass follows autocast.
    if h.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    torch_runs = wanted in (dispatch.AUTO, "torch")
    return torch_runs and len(h) * len(embedding) <= tiles.PLAIN_LOGITS


def _op(custom: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    # A compiler needs the custom op; in eager mode its bookkeeping takes longer than a small loss.
    return custom if torch.compiler.is_compiling() else plain


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        h: Tensor,
        embedding: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        selected: Tensor | None,
        wanted: str,
    ) -> Tensor:
        run = _op(_forward, _run_forward)
        # How many numbers to keep depends on the mask, which a compiler does not know.
        keep = not torch.compiler.is_compiling()
        losses, statistics, kept = run(h, embedding, bias, targets, selected, wanted, keep)
        ctx.save_for_backward(h, embedding, bias, targets, selected, statistics, kept)
        ctx.wanted = wanted
        return losses

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise UsageError(
                "linear_cross_entropy: its gradients cannot be differentiated again; "
                "call backward or autograd.grad without create_graph=True"
            )
        wants = [bool(needed) for needed in ctx.needs_input_grad[:3]]
        run = _op(_backward, _run_backward)
        found = run(gradient, *ctx.saved_tensors, ctx.wanted, *wants)
        gradients = [g if wanted else None for g, wanted in zip(found, wants, strict=True)]
        return (*gradients, None, None, None)


def _run_forward(
    h: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    selected: Tensor | None,
    wanted: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], (m, s) [2, N], and what the backend keeps for the backward pass."""
    backend = dispatch.select(_OP, h, kernel_backend=wanted)
    with _without_autocast(h.device):
        losses, statistics, kept = backend.run(h, embedding, bias, targets, selected, keep)
    return losses, statistics, kept


_forward = torch.library.custom_op(
    "dlmone_fast::linear_cross_entropy_forward", _run_forward, mutates_args=()
)


@_forward.register_fake
def _(h, embedding, bias, targets, selected, wanted, keep):  # type: ignore[no-untyped-def]
    backend = dispatch.select(_OP, h, kernel_backend=wanted)
    losses = h.new_empty(len(h), dtype=torch.float32)
    statistics = h.new_empty(2, len(h), dtype=torch.float32)
    if backend.name == "triton":
        return losses, statistics, h.new_empty(len(h) + 1, dtype=torch.int32)
    return losses, statistics, h.new_empty(0, dtype=torch.float32)


def _run_backward(
    gradient: Tensor,
    h: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    selected: Tensor | None,
    statistics: Tensor,
    kept: Tensor,
    wanted: str,
    want_h: bool,
    want_embedding: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, embedding and bias; an empty tensor for each that is not wanted."""
    backend = dispatch.select(_OP_BACKWARD, h, kernel_backend=wanted)
    saved = (h, embedding, bias, targets, selected, statistics, kept)
    with _without_autocast(h.device):
        found = backend.run(gradient, *saved, want_h, want_embedding, want_bias)
    like = (h, embedding, h if bias is None else bias)
    dh, de, db = (
        t.new_empty(0) if g is None else g.to(t.dtype) for g, t in zip(found, like, strict=True)
    )
    return dh, de, db


_backward = torch.library.custom_op(
    "dlmone_fast::linear_cross_entropy_backward", _run_backward, mutates_args=()
)


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    gradient, h, embedding, bias, targets, selected, statistics, kept, wanted, *wants
):
    like = (h, embedding, h if bias is None else bias)
    shapes = (h.shape, embedding.shape, (len(embedding),))
    each = zip(like, shapes, wants, strict=True)
    return tuple(t.new_empty(shape if want else (0,)) for t, shape, want in each)


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
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise UsageError(
                f"linear_cross_entropy: {name} must be float32, float16 or bfloat16, "
                f"got {tensor.dtype}; convert it with .float()"
            )
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


def _triton(*arguments: Any) -> Any:
    from dlmone_fast.kernels.triton import linear_cross_entropy as kernels

    _, embedding, _, targets, selected, _ = arguments
    if targets.device.type == "cpu":
        tiles.check_targets(tiles.take(targets, tiles.rows_of(selected)), len(embedding))
    return kernels.forward(*arguments)


def _triton_backward(*arguments: Any) -> Any:
    from dlmone_fast.kernels.triton import linear_cross_entropy as kernels

    return kernels.backward(*arguments)


dispatch.register(
    _OP,
    dispatch.Backend("triton", support.usable, _triton, support.automatic),
    dispatch.Backend("torch", lambda *tensors: None, tiles.run),
)
dispatch.register(
    _OP_BACKWARD,
    dispatch.Backend("triton", support.usable, _triton_backward, support.automatic),
    dispatch.Backend("torch", lambda *tensors: None, tiles.run_backward),
)
