r"""The forward process on target positions: x_t = alpha_t x_0 + sigma_t eps, sources kept clean.

DiffuSeq (arXiv 2210.08933) diffuses the target part of a sequence and conditions on the clean
source part; the score-distillation losses of DLM-One (arXiv 2506.00290) noise the generator's
output in the same way. eps is the noise of `kernels/noise.py` for (seed, stream, sample, step),
made where it is used: nothing of the size of x_t is held besides x_0 and x_t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlmone_fast.kernels import dispatch, native
from dlmone_fast.kernels.draws import PerRow, check_draws, stream_word
from dlmone_fast.kernels.forward_diffusion_arguments import (
    check_device,
    check_factors,
    check_id_values,
    check_ids,
    check_source,
    draws_for,
    targets_of,
)
from dlmone_fast.kernels.noise import NORMAL_NS, normal_of_draws
from dlmone_fast.kernels.triton import support

_OP = "forward_diffusion"
_BACKWARD = "forward_diffusion_backward"


def forward_diffusion(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    mask: Tensor | None,
    seed: PerRow,
    stream: int,
    sample: PerRow,
    step: PerRow,
    *,
    kernel_backend: str | None = None,
) -> Tensor:
    """x_t = alpha x_0 + sigma eps where mask is not 0, x_0 elsewhere; differentiable in x_0.

    Args:
        x0: [B, L, d] in fp32, fp16 or bf16, any strides.
        alpha: fp32 [B], the signal's factor; gets no gradient.
        sigma: fp32 [B], the noise's factor; gets no gradient.
        mask: [B, L] of any real dtype, 0 on source positions; None: noise everywhere.
        seed, stream, sample, step: as for `noise.normal`; one of them has an entry for each row
            unless B is 1.
        kernel_backend: "triton", "cpp" (fp32 on CPUs), "torch", "auto"; default as `dispatch` says.

    Returns:
        x_t [B, L, d] in the dtype of x0, computed in fp32 and rounded once.

    Raises:
        UsageError: shapes, dtypes, devices or values that do not fit.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    check_source("x0", x0, 3, "[B, L, d]")
    rows, length = x0.shape[:2]
    check_factors(rows, x0.device, alpha=alpha, sigma=sigma)
    targets = targets_of(mask, rows, length, x0.device)
    draws = draws_for(rows, seed, sample, step, x0.device)
    wanted = dispatch.requested(_OP, kernel_backend)
    x_t: Tensor = _ForwardDiffusion.apply(
        x0, None, alpha, sigma, targets, draws, stream_word(_OP, stream), wanted
    )
    return x_t


def forward_diffusion_of_tokens(
    ids: Tensor,
    embedding: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    mask: Tensor | None,
    seed: PerRow,
    stream: int,
    sample: PerRow,
    step: PerRow,
    *,
    kernel_backend: str | None = None,
) -> Tensor:
    """`forward_diffusion` of x_0 = embedding[ids], which the kernels never store.

    Args:
        ids: integers [B, L] in [0, V). On a CPU they are checked, also in compiled graphs. On a
            GPU nobody looks at them: the row of one outside of the table is NaN (triton); torch
            counts down to -V from the table's end and stops with a device-side assertion beyond.
            The gradient of such a row is added to a row at the table's edge.
        embedding: [V, d] in fp32, fp16 or bf16; its gradient is summed in fp32, in one order.

    The other arguments, the result and the errors are those of `forward_diffusion`.
    """
    check_source("embedding", embedding, 2, "[V, d]")
    check_ids(ids, embedding)
    rows, length = ids.shape
    check_factors(rows, embedding.device, alpha=alpha, sigma=sigma)
    targets = targets_of(mask, rows, length, embedding.device)
    draws = draws_for(rows, seed, sample, step, embedding.device)
    wanted = dispatch.requested(_OP, kernel_backend)
    x_t: Tensor = _ForwardDiffusion.apply(
        embedding, ids.long(), alpha, sigma, targets, draws, stream_word(_OP, stream), wanted
    )
    return x_t


def diffuse_of_draws(
    source: Tensor,
    ids: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    mask: Tensor | None,
    draws: Tensor,
    stream: int,
    *,
    kernel_backend: str | None = None,
) -> Tensor:
    """`forward_diffusion` of rows whose noise `draws_of` describes, without gradients.

    Args:
        source: x_0 [B, L, d], or with `ids` [B, L] the table [V, d] that they index.
        draws: int64 [B, 4]; not read back: a CUDA graph may rewrite it, and `ids`.

    The other arguments, the result and the errors are those of `forward_diffusion`.
    """
    check_source("source", source, 3 if ids is None else 2, "[B, L, d], or [V, d] with ids")
    if ids is not None:
        check_ids(ids, source)
        ids = ids.long()
    rows, length = source.shape[:2] if ids is None else ids.shape
    check_factors(rows, source.device, alpha=alpha, sigma=sigma)
    targets = targets_of(mask, rows, length, source.device)
    check_draws(_OP, draws, rows)
    check_device("draws", draws, source.device)
    wanted = dispatch.requested(_OP, kernel_backend)
    run = _diffuse if torch.compiler.is_compiling() else _run_diffuse
    return run(source, ids, alpha, sigma, targets, draws, stream_word(_OP, stream), wanted)


class _ForwardDiffusion(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        ids: Tensor | None,
        alpha: Tensor,
        sigma: Tensor,
        targets: Tensor | None,
        draws: Tensor,
        stream: int,
        wanted: str,
    ) -> Tensor:
        ctx.save_for_backward(ids, alpha, targets)
        ctx.vocabulary, ctx.dtype, ctx.wanted = len(source), source.dtype, wanted
        return _diffuse(source, ids, alpha, sigma, targets, draws, stream, wanted)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, alpha, targets = ctx.saved_tensors
        if ids is None:
            to_source = _to_x0(grad, alpha, targets, ctx.wanted)
        else:
            to_source = _to_table(grad, ids, alpha, targets, ctx.vocabulary, ctx.wanted)
        return to_source.to(ctx.dtype), None, None, None, None, None, None, None


def _run_diffuse(
    source: Tensor,
    ids: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    targets: Tensor | None,
    draws: Tensor,
    stream: int,
    wanted: str,
) -> Tensor:
    if ids is not None:
        check_id_values(ids, len(source))
    backend = dispatch.select(_OP, source, kernel_backend=wanted)
    # Plain torch asked for by name is plain throughout; else its noise may come from a kernel.
    noise_backend = {"noise_backend": wanted} if backend.name == "torch" else {}
    x_t: Tensor = backend.run(source, ids, alpha, sigma, targets, draws, stream, **noise_backend)
    return x_t


_diffuse = torch.library.custom_op("dlmone_fast::forward_diffusion", _run_diffuse, mutates_args=())


@_diffuse.register_fake
def _(
    source: Tensor,
    ids: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    targets: Tensor | None,
    draws: Tensor,
    stream: int,
    wanted: str,
) -> Tensor:
    shape = source.shape if ids is None else (*ids.shape, source.shape[1])
    return source.new_empty(shape)


@torch.library.custom_op("dlmone_fast::forward_diffusion_to_x0", mutates_args=())
def _to_x0(grad: Tensor, alpha: Tensor, targets: Tensor | None, wanted: str) -> Tensor:
    backend = dispatch.select(_BACKWARD, grad, kernel_backend=wanted)
    scaled: Tensor = backend.run(grad, alpha, targets, grad.dtype)
    return scaled


@_to_x0.register_fake
def _(grad: Tensor, alpha: Tensor, targets: Tensor | None, wanted: str) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.custom_op("dlmone_fast::forward_diffusion_to_table", mutates_args=())
def _to_table(
    grad: Tensor, ids: Tensor, alpha: Tensor, targets: Tensor | None, vocabulary: int, wanted: str
) -> Tensor:
    backend = dispatch.select(_BACKWARD, grad, kernel_backend=wanted)
    scaled = backend.run(grad, alpha, targets, torch.float32)
    # torch sorts the ids and sums in that order: no atomics, the same bits every time. Ids that
    # nobody checked, on a GPU, must not make it write outside of the gradient.
    ids = ids.clamp(0, vocabulary - 1)
    return torch.ops.aten.embedding_dense_backward(scaled, ids, vocabulary, -1, False)


@_to_table.register_fake
def _(
    grad: Tensor, ids: Tensor, alpha: Tensor, targets: Tensor | None, vocabulary: int, wanted: str
) -> Tensor:
    return grad.new_empty(vocabulary, grad.shape[-1], dtype=torch.float32)


def _triton(
    source: Tensor,
    ids: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    targets: Tensor | None,
    draws: Tensor,
    stream: int,
) -> Tensor:
    from dlmone_fast.kernels.triton import forward_diffusion as kernels

    return kernels.forward_diffusion(source, ids, alpha, sigma, targets, draws, stream)


def _triton_backward(
    grad: Tensor, alpha: Tensor, targets: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from dlmone_fast.kernels.triton import forward_diffusion as kernels

    return kernels.scale_targets(grad, alpha, targets, dtype)


def _cpp_usable(x: Tensor, *others: Tensor) -> str | None:
    if x.device.type == "cpu" and x.dtype != torch.float32:
        return f"it computes in float32, not in {x.dtype}"
    return native.why_not_on(x)


def _cpp(
    source: Tensor,
    ids: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    targets: Tensor | None,
    draws: Tensor,
    stream: int,
    path: str = "",
) -> Tensor:
    source, alpha, sigma, draws = (t.contiguous() for t in (source, alpha, sigma, draws))
    ids = None if ids is None else ids.contiguous()
    targets = None if targets is None else targets.contiguous()
    shape = source.shape if ids is None else (*ids.shape, source.shape[-1])
    out = source.new_empty(shape)
    native.module().forward_diffusion(
        draws=draws,
        stream=stream,
        x0=source,
        ids=ids,
        alpha=alpha,
        sigma=sigma,
        mask=targets,
        out=out,
        threads=native.threads_for(out.numel() * NORMAL_NS),
        path=path,
    )
    return out


def _torch(
    source: Tensor,
    ids: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    targets: Tensor | None,
    draws: Tensor,
    stream: int,
    noise_backend: str = dispatch.AUTO,
) -> Tensor:
    x0 = source if ids is None else source[ids]
    _, length, channels = x0.shape
    noise = normal_of_draws(draws, stream, length, channels, kernel_backend=noise_backend)
    x_t = noise.mul_(sigma[:, None, None]).add_(x0.float() * alpha[:, None, None])
    x_t = x_t.to(x0.dtype)
    if targets is not None:
        x_t = torch.where(targets[..., None], x_t, x0)
    return x_t.contiguous()


def _torch_backward(
    grad: Tensor, alpha: Tensor, targets: Tensor | None, dtype: torch.dtype
) -> Tensor:
    factor = alpha[:, None]
    if targets is not None:
        factor = torch.where(targets, factor, 1.0)
    return (grad * factor[..., None]).to(dtype).contiguous()


dispatch.register(
    _OP,
    dispatch.Backend("triton", support.usable, _triton, support.automatic),
    dispatch.Backend("cpp", _cpp_usable, _cpp),
    dispatch.Backend("torch", lambda *tensors: None, _torch),
)
# Backward is one multiplication: on CPUs torch's own, whichever made x_t.
dispatch.register(
    _BACKWARD,
    dispatch.Backend("triton", support.usable, _triton_backward, support.automatic),
    dispatch.Backend("cpp", _cpp_usable, _torch_backward),
    dispatch.Backend("torch", lambda *tensors: None, _torch_backward),
)
