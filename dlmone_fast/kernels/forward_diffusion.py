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

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import dispatch, native
from dlmone_fast.kernels.draws import PerRow, check_draws, draws_of, stream_word
from dlmone_fast.kernels.noise import normal_of_draws
from dlmone_fast.kernels.triton import support

_OP = "forward_diffusion"
_BACKWARD = "forward_diffusion_backward"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    _check_source("x0", x0, 3, "[B, L, d]")
    rows, length = x0.shape[:2]
    _check_factors(rows, x0.device, alpha=alpha, sigma=sigma)
    targets = _targets(mask, rows, length, x0.device)
    draws = _draws_for(rows, seed, sample, step, x0.device)
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
    _check_source("embedding", embedding, 2, "[V, d]")
    _check_ids(ids, embedding)
    rows, length = ids.shape
    _check_factors(rows, embedding.device, alpha=alpha, sigma=sigma)
    targets = _targets(mask, rows, length, embedding.device)
    draws = _draws_for(rows, seed, sample, step, embedding.device)
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
    _check_source("source", source, 3 if ids is None else 2, "[B, L, d], or [V, d] with ids")
    if ids is not None:
        _check_ids(ids, source)
    rows, length = source.shape[:2] if ids is None else ids.shape
    _check_factors(rows, source.device, alpha=alpha, sigma=sigma)
    targets = _targets(mask, rows, length, source.device)
    check_draws(_OP, draws, rows)
    _check_device("draws", draws, source.device)
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
        _check_values(ids, len(source))
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
    # Names keep the contiguous copies alive until the call returns.
    source, alpha, sigma, draws = (t.contiguous() for t in (source, alpha, sigma, draws))
    ids = None if ids is None else ids.contiguous()
    targets = None if targets is None else targets.contiguous()
    rows, length = source.shape[:2] if ids is None else ids.shape
    out = source.new_empty(rows, length, source.shape[-1])
    native.module().forward_diffusion(
        draws=draws.data_ptr(),
        rows=rows,
        stream=stream,
        positions=length,
        channels=source.shape[-1],
        x0=source.data_ptr(),
        ids=0 if ids is None else ids.data_ptr(),
        alpha=alpha.data_ptr(),
        sigma=sigma.data_ptr(),
        mask=0 if targets is None else targets.data_ptr(),
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
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


def _check_source(name: str, source: Tensor, dim: int, shape: str) -> None:
    if source.dim() != dim or source.shape[-1] < 1:
        raise UsageError(
            f"{_OP}: {name} must have shape {shape} with d >= 1, got {tuple(source.shape)}"
        )
    if source.dtype not in _DTYPES:
        raise UsageError(
            f"{_OP}: {name} must be float32, float16 or bfloat16, got {source.dtype}; "
            "convert it with .float()"
        )


def _check_ids(ids: Tensor, embedding: Tensor) -> None:
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UsageError(f"{_OP}: ids must be integers [B, L], got {ids.dtype} {tuple(ids.shape)}")
    _check_device("ids", ids, embedding.device)


def _check_values(ids: Tensor, vocabulary: int) -> None:
    # Called where the operation runs: while a graph is traced there is nothing to read. Reading
    # ids back would stall a GPU.
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= vocabulary:
        raise UsageError(
            f"{_OP}: ids must lie in [0, {vocabulary}), the rows of embedding, "
            f"got values from {low} to {high}; tokenize with the model's own vocabulary"
        )


def _check_factors(rows: int, device: torch.device, **factors: Tensor) -> None:
    for name, factor in factors.items():
        if factor.shape != (rows,) or factor.dtype != torch.float32:
            raise UsageError(
                f"{_OP}: {name} must be float32 [{rows}], one value a row, "
                f"got {factor.dtype} {tuple(factor.shape)}"
            )
        _check_device(name, factor, device)
        if factor.requires_grad:
            raise UsageError(f"{_OP}: {name} gets no gradient; pass {name}.detach()")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise UsageError(
            f"{_OP}: {name} is on {tensor.device} and the data on {device}; move it there"
        )


def _targets(mask: Tensor | None, rows: int, length: int, device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape != (rows, length) or mask.is_complex():
        raise UsageError(
            f"{_OP}: mask must be real [{rows}, {length}], 0 on source positions, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    _check_device("mask", mask, device)
    return mask if mask.dtype == torch.bool else mask != 0


def _draws_for(
    rows: int, seed: PerRow, sample: PerRow, step: PerRow, device: torch.device
) -> Tensor:
    draws = draws_of(seed, sample, step, device)
    if len(draws) == rows:
        return draws
    if rows == 0 and len(draws) == 1:
        return draws[:0]
    raise UsageError(
        f"{_OP}: seed, sample and step name {len(draws)} row(s) of noise for {rows} row(s) of "
        "data; give one of them an entry for each row (sample: the row's sample index)"
    )


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
