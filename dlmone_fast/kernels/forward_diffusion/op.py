r"""The forward process on target positions: x_t = alpha_t x_0 + sigma_t eps, sources kept clean.

DiffuSeq (arXiv 2210.08933) diffuses the target part of a sequence and conditions on the clean
source part; the score-distillation losses of DLM-One (arXiv 2506.00290) noise the generator's
output in the same way. eps is the noise of `kernels/noise` for (seed, stream, sample, step),
made where it is used: nothing of the size of x_t is held besides x_0 and x_t.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import dispatch
from dlmone_fast.kernels.forward_diffusion import native as cpp
from dlmone_fast.kernels.forward_diffusion import torch as plain
from dlmone_fast.kernels.noise.draws import PerRow, check_draws, draws_of, stream_word
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
    targets = _checked(x0, None, alpha, sigma, mask, name="x0", shape="[B, L, d]")
    draws = _draws_for(x0.shape[0], seed, sample, step, x0.device)
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
    targets = _checked(embedding, ids, alpha, sigma, mask, name="embedding", shape="[V, d]")
    draws = _draws_for(len(ids), seed, sample, step, embedding.device)
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
    shape = "[B, L, d], or [V, d] with ids"
    targets = _checked(source, ids, alpha, sigma, mask, name="source", shape=shape)
    check_draws(_OP, draws, len(alpha))
    _check_device("draws", draws, source.device)
    ids = None if ids is None else ids.long()
    wanted = dispatch.requested(_OP, kernel_backend)
    purpose = stream_word(_OP, stream)
    return _diffuse(source.detach(), ids, alpha, sigma, targets, draws, purpose, wanted)


class _ForwardDiffusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Takes the arguments of `_diffuse`."""
        source, ids, alpha, _, targets, _, _, wanted = arguments
        ctx.save_for_backward(ids, alpha, targets)
        ctx.vocabulary, ctx.dtype, ctx.wanted = len(source), source.dtype, wanted
        return _diffuse(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, alpha, targets = ctx.saved_tensors
        if ids is None:
            to_source = _to_x0(grad, alpha, targets, ctx.wanted)
        else:
            to_source = _to_table(grad, ids, alpha, targets, ctx.vocabulary, ctx.wanted)
        return to_source.to(ctx.dtype), None, None, None, None, None, None, None


def _with_known_ids(
    backend: dispatch.Backend, source: Tensor, ids: Tensor | None, *others: Any
) -> Tensor:
    # Checked where the operation runs: while a graph is traced there is nothing to read. Reading
    # ids back would stall a GPU.
    if ids is not None and ids.device.type == "cpu" and ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= len(source):
            raise UsageError(
                f"{_OP}: ids must lie in [0, {len(source)}), the rows of embedding, "
                f"got values from {low} to {high}; tokenize with the model's own vocabulary"
            )
    *given, wanted = others
    # Plain torch asked for by name is plain throughout; else its noise may come from a kernel.
    noise_backend = (wanted,) if backend.name == "torch" else ()
    x_t: Tensor = backend.run(source, ids, *given, *noise_backend)
    return x_t


@dispatch.operation(_OP, around=_with_known_ids)
def _diffuse(
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


@dispatch.operation(_BACKWARD, name="forward_diffusion_to_x0")
def _to_x0(grad: Tensor, alpha: Tensor, targets: Tensor | None, wanted: str) -> Tensor:
    return grad.new_empty(grad.shape)


def _summed_by_id(
    backend: dispatch.Backend,
    grad: Tensor,
    ids: Tensor,
    alpha: Tensor,
    targets: Tensor | None,
    vocabulary: int,
    wanted: str,
) -> Tensor:
    scaled = backend.run(grad, alpha, targets, dtype=torch.float32)
    # torch sorts the ids and sums in that order: no atomics, the same bits every time. Ids that
    # nobody checked, on a GPU, must not make it write outside of the gradient.
    ids = ids.clamp(0, vocabulary - 1)
    return torch.ops.aten.embedding_dense_backward(scaled, ids, vocabulary, -1, False)


@dispatch.operation(_BACKWARD, name="forward_diffusion_to_table", around=_summed_by_id)
def _to_table(
    grad: Tensor, ids: Tensor, alpha: Tensor, targets: Tensor | None, vocabulary: int, wanted: str
) -> Tensor:
    return grad.new_empty(vocabulary, grad.shape[-1], dtype=torch.float32)


def _checked(
    source: Tensor,
    ids: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    mask: Tensor | None,
    *,
    name: str,
    shape: str,
) -> Tensor | None:
    """The mask as bools, after every argument but those of the noise was checked."""
    if source.dim() != (3 if ids is None else 2) or source.shape[-1] < 1:
        raise UsageError(
            f"{_OP}: {name} must have shape {shape} with d >= 1, got {tuple(source.shape)}"
        )
    dispatch.check_dtype(_OP, name, source)
    if ids is not None:
        if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise UsageError(
                f"{_OP}: ids must be integers [B, L], got {ids.dtype} {tuple(ids.shape)}"
            )
        _check_device("ids", ids, source.device)
    rows, length = source.shape[:2] if ids is None else ids.shape
    for factor_name, factor in (("alpha", alpha), ("sigma", sigma)):
        if factor.shape != (rows,) or factor.dtype != torch.float32:
            raise UsageError(
                f"{_OP}: {factor_name} must be float32 [{rows}], one value a row, "
                f"got {factor.dtype} {tuple(factor.shape)}"
            )
        _check_device(factor_name, factor, source.device)
        if factor.requires_grad:
            raise UsageError(f"{_OP}: {factor_name} gets no gradient; pass {factor_name}.detach()")
    if mask is None:
        return None
    if mask.shape != (rows, length) or mask.is_complex():
        raise UsageError(
            f"{_OP}: mask must be real [{rows}, {length}], 0 on source positions, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    _check_device("mask", mask, source.device)
    return mask if mask.dtype == torch.bool else mask != 0


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise UsageError(
            f"{_OP}: {name} is on {tensor.device} and the data on {device}; move it there"
        )


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


def _kernels() -> ModuleType:
    from dlmone_fast.kernels.forward_diffusion import triton

    return triton


dispatch.register(
    _OP,
    support.backend(lambda: _kernels().forward_diffusion),
    dispatch.Backend("cpp", cpp.usable, cpp.forward_diffusion, device="cpu"),
    dispatch.in_torch(plain.forward_diffusion),
)
# Backward is one multiplication: on CPUs torch's own, whichever made x_t.
dispatch.register(
    _BACKWARD,
    support.backend(lambda: _kernels().scale_targets),
    dispatch.Backend("cpp", cpp.usable, plain.scale_targets, device="cpu"),
    dispatch.in_torch(plain.scale_targets),
)
