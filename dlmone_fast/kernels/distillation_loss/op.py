r"""Score distillation: the SiD loss of DLM-One (arXiv 2506.00290, Eq. 4) or the KL form, with its
per-sample weight and the gradients in closed form.

With A = x̂_φ - x̂_ψ, R = x̂_ψ - x, sums over target positions and channels, n_b their number::

    w_b      = max(weight_floor, mean |x - x̂_φ|)                 a constant
    sid      = h_b / (w_b n_b) * sum (1 - mu) A^2 + A R
      d/dx   = -s A                    with s = h_b / (w_b n_b)
      d/dx̂_φ = s (R + 2 (1 - mu) A)
      d/dx̂_ψ = s A - d/dx̂_φ
    kl       = h_b / (w_b n_b) * sum (-A) x                      A a constant
      d/dx   = -s A

The kl form is distribution matching: its gradient is the difference of the two scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.checks import as_real
from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import dispatch
from dlmone_fast.kernels.distillation_loss import torch as plain
from dlmone_fast.kernels.triton import support

FORWARD = "distillation_loss"
GRADIENTS = "distillation_loss_gradients"
_FORMS = ("sid", "kl")


def distillation_loss(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    *,
    form: str = "sid",
    mu: float = 1.0,
    weight_floor: float,
    multiplier: Tensor | float | None = None,
    kernel_backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and weight per sample; every difference and sum is taken in fp32.

    Args:
        x: the generator's output [B, L, d] in fp32, fp16 or bf16.
        x0_teacher: x̂_φ, the teacher's prediction: shape, dtype and device of x.
        x0_score: x̂_ψ, the score estimator's prediction: likewise.
        mask: [B, L], not 0 on target positions; the others are never read, whatever they hold.
        form: "sid" (gradients to x, x̂_φ and x̂_ψ) or "kl" (a gradient to x only).
        mu: μ of the SiD loss; the kl form ignores it.
        weight_floor: lowest weight, > 0, in units of the embedding; 5 % of its root mean square
            is a sound choice: `weight_floor(0.05, embedding)` of this module computes it.
        multiplier: h [B] or one number, a constant to the gradient; default 1.
        kernel_backend: "triton", "torch", "auto"; default as `dispatch` says.

    Returns:
        loss: fp32 [B]. The SiD loss may be negative: it is no measure of progress.
        weight: w, fp32 [B], no gradient.
        A sample without target positions has loss 0, gradients 0 and weight `weight_floor`.

    Gradients have the dtype of x and are 0 where the mask is. They cannot be differentiated again.

    Memory passes over a [B, L, d] tensor, in the Triton backend with all three gradients: the
    forward pass reads 3 and writes the 3 gradients of the summed loss. A sample's inputs are read
    twice by one program, since the weight must be known before a gradient is, and the second
    time from cache. If the loss is then summed and nothing else scales it, the backward pass finds
    a factor of 1 on the device and touches nothing: 6 passes. Any other factor costs 6 more,
    as does a second backward pass; so give constants of the objective as `multiplier`. Samples
    over 32768 numbers are spread over programs and read a second time: 9 passes. Under
    torch.compile the gradients are computed in the backward pass from the inputs: 9, for every
    factor.

    Raises:
        UsageError: shapes, dtypes, devices or values that do not fit.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    tensors = {"x": x, "x0_teacher": x0_teacher, "x0_score": x0_score}
    _check(tensors, mask)
    _check_values(form, mu, weight_floor)
    h, factor = _multiplier(multiplier, x)
    wanted = dispatch.requested(FORWARD, kernel_backend)
    kl = form == "kl"
    count = _gradients_needed(x, x0_teacher, x0_score, kl)
    constants = (h, factor, kl, float(mu), float(weight_floor))
    arguments = (x, x0_teacher, x0_score, mask, *constants, count, wanted)
    if count:
        early = _in_the_forward_pass(x, wanted)
        result: tuple[Tensor, Tensor] = _DistillationLoss.apply(early, *arguments)
        return result
    # The kl form has no gradient to the predictions, whatever they ask for.
    with torch.no_grad():
        loss, weight, *_ = _forward(*arguments)
    return loss, weight


def weight_floor(fraction: float, embedding: Tensor) -> float:
    """The floor of w as a fraction of the root mean square of an embedding [V, d], at least 1e-5.

    Waits for the device: compute it once per model.
    """
    rms = float(embedding.detach().float().square().mean().sqrt())
    return max(1e-5, fraction * rms)


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, early: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Takes the arguments of `_forward`, and whether it makes the gradients already."""
        x, x0_teacher, x0_score, mask, *constants, count, wanted = arguments
        given = [*arguments[:-2], count if early else 0, wanted]
        loss, weight, scale, *gradients = _forward(*given)
        ctx.save_for_backward(x, x0_teacher, x0_score, mask, scale)
        # Handed out once, by the first backward pass: a gradient that a caller has is never
        # written again.
        ctx.unclaimed = [gradients] if early else None
        ctx.mu, ctx.count, ctx.wanted = constants[3], count, wanted
        ctx.mark_non_differentiable(weight)
        ctx.set_materialize_grads(False)
        return loss, weight

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        dispatch.refuse_second_derivative(FORWARD)
        if upstream is None:
            return (None,) * 12
        arguments = (*ctx.saved_tensors, upstream, ctx.mu, ctx.count)
        if ctx.unclaimed:
            gradients = ctx.unclaimed.pop()
            # Triton's: overwrites those of samples whose factor is not 1; the device decides.
            backend = dispatch.select(GRADIENTS, upstream, kernel_backend=ctx.wanted)
            backend.run(*arguments, gradients[: ctx.count])
        else:
            given = [*arguments, ctx.wanted]
            gradients = _gradients(*given)
        of_inputs = [*gradients[: ctx.count], None, None][:3]
        return (None, *of_inputs, *(None,) * 8)


def _padded(gradients: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # An operation returns a fixed number of tensors, none of them twice.
    first, second, third = (*gradients, *(x.new_empty(0) for _ in range(3 - len(gradients))))
    return first, second, third


def _empty(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    new = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(count)]
    return _padded(new, x)


def _run_forward(backend: dispatch.Backend, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    loss, weight, scale, *gradients = backend.run(x, *others[:-1])
    return loss, weight, scale, *_padded(gradients, x)


@dispatch.operation(FORWARD, name="distillation_loss_forward", around=_run_forward)
def _forward(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    multiplier: Tensor | None,
    factor: float,
    kl: bool,
    mu: float,
    floor: float,
    count: int,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, w and s, fp32 [B], and the first `count` (0, 1, 3) gradients of the summed loss."""
    loss, weight, scale = (x.new_empty(len(x), dtype=torch.float32) for _ in range(3))
    return loss, weight, scale, *_empty(x, count)


def _run_gradients(backend: dispatch.Backend, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _padded(backend.run(x, *others[:-1]), x)


@dispatch.operation(GRADIENTS, around=_run_gradients)
def _gradients(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    scale: Tensor,
    upstream: Tensor,
    mu: float,
    count: int,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` gradients times `upstream` [B], from the inputs and s [B]."""
    return _empty(x, count)


def _gradients_needed(x: Tensor, x0_teacher: Tensor, x0_score: Tensor, kl: bool) -> int:
    if not torch.is_grad_enabled():
        return 0
    if not kl and (x0_teacher.requires_grad or x0_score.requires_grad):
        return 3
    return int(x.requires_grad)


def _in_the_forward_pass(x: Tensor, wanted: str) -> bool:
    # A traced backward pass cannot know whether it is the first.
    if torch.compiler.is_compiling():
        return False
    return dispatch.select(FORWARD, x, kernel_backend=wanted).name == "triton"


def _check(tensors: dict[str, Tensor], mask: Tensor) -> None:
    x = tensors["x"]
    if x.dim() != 3 or x.shape[2] == 0:
        raise UsageError(
            f"distillation_loss: x must have shape [B, L, d] with d >= 1, got {tuple(x.shape)}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != x.shape:
            raise UsageError(
                f"distillation_loss: {name} must have the shape of x, {tuple(x.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        dispatch.check_dtype(FORWARD, name, tensor)
        if tensor.dtype != x.dtype:
            raise UsageError(
                f"distillation_loss: {name} is {tensor.dtype} and x is {x.dtype}; convert all "
                "three to one dtype, best float32"
            )
        _check_device(name, tensor, x)
    if mask.shape != x.shape[:2]:
        raise UsageError(
            f"distillation_loss: mask must have shape [B, L] = {tuple(x.shape[:2])}, "
            f"got {tuple(mask.shape)}"
        )
    _check_device("mask", mask, x)


def _check_values(form: str, mu: float, floor: float) -> None:
    if form not in _FORMS:
        raise UsageError(f'distillation_loss: form must be "sid" or "kl", got {form!r}')
    if as_real(mu) is None or not math.isfinite(mu):
        raise UsageError(f"distillation_loss: mu must be a finite number, got {mu}")
    # The fp32 kernels would see anything smaller as 0.
    if as_real(floor) is None or not 1e-30 <= floor < math.inf:
        raise UsageError(
            f"distillation_loss: weight_floor must lie in [1e-30, inf), got {floor}; "
            "weight_floor(0.05, embedding) of this module gives 5 % of the embedding's scale"
        )


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise UsageError(
            f"distillation_loss: {name} is on {tensor.device} and x on {x.device}; "
            "move them to one device"
        )


def _multiplier(multiplier: Tensor | float | None, x: Tensor) -> tuple[Tensor | None, float]:
    if multiplier is None:
        return None, 1.0
    if not isinstance(multiplier, Tensor):
        return None, float(multiplier)
    if multiplier.shape != x.shape[:1] or not multiplier.is_floating_point():
        raise UsageError(
            f"distillation_loss: multiplier must be a number or floating-point [B] = "
            f"[{len(x)}], got {multiplier.dtype} {tuple(multiplier.shape)}"
        )
    _check_device("multiplier", multiplier, x)
    return multiplier.detach().float(), 1.0


def _kernels() -> ModuleType:
    from dlmone_fast.kernels.distillation_loss import triton

    return triton


dispatch.register(
    FORWARD, support.backend(lambda: _kernels().forward), dispatch.in_torch(plain.forward)
)
dispatch.register(
    GRADIENTS, support.backend(lambda: _kernels().gradients), dispatch.in_torch(plain.gradients)
)
