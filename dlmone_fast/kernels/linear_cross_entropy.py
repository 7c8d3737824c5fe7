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
from dlmone_fast.kernels.triton import support

_OP = "linear_cross_entropy"
_OP_BACKWARD = "linear_cross_entropy_backward"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# A tile of logits in the torch backend, tokens x words: 2 MB, about a core's second-level cache.
# Of the shapes from 128 to 2048 tokens and 256 to 2048 words it measured fastest, on 1 CPU core.
_TILE_TOKENS = 1024
_TILE_LOGITS = 1 << 19

# Up to this many logits the torch backend keeps exp(z - m) for the backward pass (4 MB) instead of
# making every tile again: they are still in a cache, and a pass over few words is mostly overhead.
_KEPT_LOGITS = 1 << 20

# Finite, so that a tile of words that are all ruled out (bias -inf) adds 0 and not NaN.
_LOWEST = torch.finfo(torch.float32).min


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

    Differentiable once in h, embedding and bias. Computes in the dtypes it is given, also under
    autocast: products of 16-bit numbers add up in fp32, and the softmax is fp32. Of two dtypes
    the wider one is used; cast the table for tensor-core speed on a GPU. Deterministic.

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
        UsageError: shapes, dtypes or devices that do not fit, or targets outside the vocabulary.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    _check(h, embedding, targets, bias, mask)
    wanted = dispatch.requested(_OP, kernel_backend)
    dtype = torch.promote_types(h.dtype, embedding.dtype)
    operands = (h.reshape(-1, h.shape[-1]).to(dtype), embedding.to(dtype), bias)
    selected = None if mask is None else (mask != 0).reshape(-1)
    where = (targets.reshape(-1), selected, wanted)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        losses: Tensor = _LinearCrossEntropy.apply(*operands, *where)
    else:
        losses = _op(_forward, _run_forward)(*operands, *where, False)[0]
    return losses.view(targets.shape)


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
        losses, statistics, kept = run(h, embedding, bias, targets, selected, wanted, True)
        ctx.save_for_backward(h, embedding, bias, targets, selected, statistics, kept)
        ctx.wanted = wanted
        return losses

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
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
    kept = _kept_shape(h, embedding, keep)
    return losses, statistics, h.new_empty(kept, dtype=torch.float32)


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


def _check_targets(selected_targets: Tensor, v: int) -> None:
    # Reading a value makes the host wait for a GPU: checked on CPUs alone.
    if selected_targets.device.type != "cpu" or not selected_targets.numel():
        return
    low, high = (int(extreme) for extreme in selected_targets.aminmax())
    if low < 0 or high >= v:
        raise UsageError(
            f"linear_cross_entropy: targets must lie in [0, {v}) at selected positions, "
            f"found {low if low < 0 else high}; leave such positions out with mask="
        )


def _kept_shape(h: Tensor, embedding: Tensor, keep: bool) -> tuple[int, ...]:
    shape = (len(h), len(embedding))
    return shape if keep and shape[0] * shape[1] <= _KEPT_LOGITS else (0,)


def _torch(
    h: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    selected: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(selected)
    x, y = _take(h, rows).float(), _take(targets, rows)
    _check_targets(y, len(embedding))
    kept = torch.empty(_kept_shape(h, embedding, keep), dtype=torch.float32, device=h.device)
    if kept.numel():
        m, s, target = _keeping(x, embedding.float(), bias, y, kept[: len(x)])
    else:
        m, s, target = _online(x, embedding, bias, y)
    # The difference first: logits may be much larger than the loss.
    found = (m - target).add_(s.log())
    if rows is None:
        return found, torch.stack((m, s)), kept
    losses = found.new_zeros(len(h)).index_copy_(0, rows, found)
    padding = (0, len(h) - len(x))
    return losses, torch.nn.functional.pad(torch.stack((m, s)), padding), kept


def _torch_backward(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows = _rows(selected)
    x, y = _take(h, rows).float(), _take(targets, rows)
    m, s = statistics[:, : len(x)]
    # Tiles hold s (p - [v = y]), so that a pass over vectors of V numbers is saved.
    weight = _take(gradient, rows) / s
    weighted = x * weight[:, None]
    if kept.numel():
        z = kept[: len(x)]
        dx = z @ embedding.float() if want_h else None
        de = z.T @ weighted if want_embedding else None
        db = z.T @ weight if want_bias else None
    else:
        dx = torch.zeros_like(x) if want_h else None
        de = torch.zeros_like(embedding, dtype=torch.float32) if want_embedding else None
        db = x.new_zeros(len(embedding)) if want_bias else None
        _again(x, embedding, bias, y, m, s, weighted, weight, dx, de, db)
    if dx is not None:
        dx = dx.mul_(weight[:, None]).to(h.dtype)
        if rows is not None:
            dx = h.new_zeros(h.shape).index_copy_(0, rows, dx)
    return dx, de, db


def _rows(selected: Tensor | None) -> Tensor | None:
    return None if selected is None else selected.nonzero().squeeze(1)


def _take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _keeping(
    x: Tensor, embedding: Tensor, bias: Tensor | None, targets: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(m, s = sum exp(z - m), target logit); z becomes s (p - [v = y])."""
    _logits(x, embedding, bias, z)
    m = z.amax(1)
    place = targets[:, None]
    target = z.gather(1, place)[:, 0]
    s = z.sub_(m[:, None]).exp_().sum(1)
    _subtract(z, place, s)
    return m, s, target


def _online(
    x: Tensor, embedding: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(m, s = sum exp(z - m), target logit), the maximum and the sum kept up to date by tile."""
    m, s, target = x.new_full((len(x),), _LOWEST), x.new_zeros(len(x)), x.new_zeros(len(x))
    tile_words, storage = _tile(len(x), embedding)
    for first in range(0, len(embedding), tile_words):
        words = embedding[first : first + tile_words].float()
        part = None if bias is None else bias[first : first + tile_words]
        for rows in _token_tiles(len(x)):
            z = _logits(x[rows], words, part, _shaped(storage, x[rows], words))
            place, inside = _place(targets[rows], first, len(words))
            target[rows] = torch.where(inside, z.gather(1, place[:, None])[:, 0], target[rows])
            highest = torch.maximum(m[rows], z.amax(1))
            total = z.sub_(highest[:, None]).exp_().sum(1)
            s[rows] = s[rows] * (m[rows] - highest).exp() + total
            m[rows] = highest
    return m, s, target


def _again(
    x: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    m: Tensor,
    s: Tensor,
    weighted: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    de: Tensor | None,
    db: Tensor | None,
) -> None:
    """Adds the gradients to dx (not yet times the weight), de and db, making every tile again."""
    tile_words, storage = _tile(len(x), embedding)
    for first in range(0, len(embedding), tile_words):
        part = slice(first, first + tile_words)
        words = embedding[part].float()
        de_part, db_part = (None if total is None else total[part] for total in (de, db))
        for rows in _token_tiles(len(x)):
            z = _shaped(storage, x[rows], words)
            # The product is added to b - m in place: no further pass to subtract m.
            offset = 0.0 if bias is None else bias[None, part].float()
            torch.sub(offset, m[rows, None].expand_as(z), out=z)
            z.addmm_(x[rows], words.T).exp_()
            place, inside = _place(targets[rows], first, len(words))
            _subtract(z, place[:, None], s[rows] * inside)
            # The weights multiply vectors of d numbers, not of V.
            if dx is not None:
                dx[rows].addmm_(z, words)
            if de_part is not None:
                de_part.addmm_(z.T, weighted[rows])
            if db_part is not None:
                db_part.addmv_(z.T, weight[rows])


def _subtract(z: Tensor, place: Tensor, values: Tensor) -> None:
    z.scatter_(1, place, z.gather(1, place).sub_(values[:, None]))


def _logits(x: Tensor, words: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, words.T, out=out)
    return torch.addmm(bias.float(), x, words.T, out=out)


def _place(targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Columns of the targets in a tile of words, clamped, and whether they lie in it."""
    place = targets - first
    return place.clamp(0, count - 1), (place >= 0) & (place < count)


def _token_tiles(n: int) -> list[slice]:
    return [slice(first, first + _TILE_TOKENS) for first in range(0, n, _TILE_TOKENS)]


def _tile(n: int, embedding: Tensor) -> tuple[int, Tensor]:
    tokens = max(1, min(n, _TILE_TOKENS))
    words = min(len(embedding), max(1, _TILE_LOGITS // tokens))
    return words, torch.empty(tokens * words, dtype=torch.float32, device=embedding.device)


def _shaped(storage: Tensor, x: Tensor, words: Tensor) -> Tensor:
    return storage[: len(x) * len(words)].view(len(x), len(words))


def _triton(*arguments: Any) -> Any:
    from dlmone_fast.kernels.triton import linear_cross_entropy as kernels

    _, embedding, _, targets, selected, _ = arguments
    if targets.device.type == "cpu":
        _check_targets(_take(targets, _rows(selected)), len(embedding))
    return kernels.forward(*arguments)


def _triton_backward(*arguments: Any) -> Any:
    from dlmone_fast.kernels.triton import linear_cross_entropy as kernels

    return kernels.backward(*arguments)


dispatch.register(
    _OP,
    dispatch.Backend("triton", support.usable, _triton, support.automatic),
    dispatch.Backend("torch", lambda *tensors: None, _torch),
)
dispatch.register(
    _OP_BACKWARD,
    dispatch.Backend("triton", support.usable, _triton_backward, support.automatic),
    dispatch.Backend("torch", lambda *tensors: None, _torch_backward),
)
