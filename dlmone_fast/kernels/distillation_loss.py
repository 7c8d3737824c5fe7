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
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.checks import as_real
from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import dispatch
from dlmone_fast.kernels.triton import support

FORWARD = "distillation_loss"
GRADIENTS = "distillation_loss_gradients"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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
    constants = (h, factor, kl, 1.0 - mu, float(weight_floor))
    if count:
        early = _in_the_forward_pass(x, wanted)
        result: tuple[Tensor, Tensor] = _DistillationLoss.apply(
            x, x0_teacher, x0_score, mask, constants, count, early, wanted
        )
        return result
    # The kl form has no gradient to the predictions, whatever they ask for.
    with torch.no_grad():
        loss, weight, *_ = _forward(x, x0_teacher, x0_score, mask, *constants, 0, wanted)
    return loss, weight


def weight_floor(fraction: float, embedding: Tensor) -> float:
    """The floor of w as a fraction of the root mean square of an embedding [V, d], at least 1e-5.

    Waits for the device: compute it once per model.
    """
    rms = float(embedding.detach().float().square().mean().sqrt())
    return max(1e-5, fraction * rms)


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x0_teacher: Tensor,
        x0_score: Tensor,
        mask: Tensor,
        constants: tuple[Tensor | None, float, bool, float, float],
        count: int,
        early: bool,
        wanted: str,
    ) -> tuple[Tensor, Tensor]:
        loss, weight, scale, *gradients = _forward(
            x, x0_teacher, x0_score, mask, *constants, count if early else 0, wanted
        )
        ctx.save_for_backward(x, x0_teacher, x0_score, mask, scale)
        # Handed out once, by the first backward pass: what a caller has is never written again.
        ctx.unclaimed = [gradients] if early else None
        ctx.rest, ctx.count, ctx.wanted = constants[3], count, wanted
        ctx.mark_non_differentiable(weight)
        ctx.set_materialize_grads(False)
        return loss, weight

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise UsageError(
                "distillation_loss: its gradients cannot be differentiated again; "
                "call backward or autograd.grad without create_graph=True"
            )
        if upstream is None:
            return (None,) * 8
        arguments = (*ctx.saved_tensors, upstream, ctx.rest, ctx.count)
        if ctx.unclaimed:
            gradients = ctx.unclaimed.pop()
            # Triton's: overwrites those of samples whose factor is not 1; the device decides.
            backend = dispatch.select(GRADIENTS, upstream, kernel_backend=ctx.wanted)
            backend.run(*arguments, gradients[: ctx.count])
        else:
            gradients = _gradients(*arguments, ctx.wanted)
        given = [*gradients[: ctx.count], None, None][:3]
        return (*given, None, None, None, None, None)


@torch.library.custom_op("dlmone_fast::distillation_loss_forward", mutates_args=())
def _forward(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    multiplier: Tensor | None,
    factor: float,
    kl: bool,
    rest: float,
    floor: float,
    count: int,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, w and s, fp32 [B], and the first `count` (0, 1, 3) gradients of the summed loss."""
    backend = dispatch.select(FORWARD, x, kernel_backend=wanted)
    loss, weight, scale, *gradients = backend.run(
        x, x0_teacher, x0_score, mask, multiplier, factor, kl, rest, floor, count
    )
    first, second, third = _padded(gradients, x)
    return loss, weight, scale, first, second, third


@_forward.register_fake
def _(x: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, weight, scale = (x.new_empty(len(x), dtype=torch.float32) for _ in range(3))
    count = given[-2]
    first, second, third = _padded([_new_like(x) for _ in range(count)], x)
    return loss, weight, scale, first, second, third


@torch.library.custom_op("dlmone_fast::distillation_loss_gradients", mutates_args=())
def _gradients(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    scale: Tensor,
    upstream: Tensor,
    rest: float,
    count: int,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` gradients times `upstream` [B], from the inputs and s [B]."""
    backend = dispatch.select(GRADIENTS, x, kernel_backend=wanted)
    made = backend.run(x, x0_teacher, x0_score, mask, scale, upstream, rest, count)
    first, second, third = _padded(made, x)
    return first, second, third


@_gradients.register_fake
def _(x: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = given[-2]
    first, second, third = _padded([_new_like(x) for _ in range(count)], x)
    return first, second, third


def _new_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _padded(gradients: list[Tensor], x: Tensor) -> list[Tensor]:
    # An operator returns a fixed number of tensors, none of them twice.
    return [*gradients, *(x.new_empty(0) for _ in range(3 - len(gradients)))]


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
        if tensor.dtype not in _DTYPES:
            raise UsageError(
                f"distillation_loss: {name} must be float32, float16 or bfloat16, "
                f"got {tensor.dtype}; convert it with .float()"
            )
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


def _triton(*arguments: Any) -> Any:
    from dlmone_fast.kernels.triton import distillation_loss as kernels

    return kernels.forward(*arguments)


def _triton_gradients(*arguments: Any) -> Any:
    from dlmone_fast.kernels.triton import distillation_loss as kernels

    return kernels.gradients(*arguments)


def _torch(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    multiplier: Tensor | None,
    factor: float,
    kl: bool,
    rest: float,
    floor: float,
    count: int,
) -> list[Tensor]:
    target = mask != 0
    distance = (x.float() - x0_teacher).abs_().sum(-1)
    a = x0_teacher.float() - x0_score
    if kl:
        value = a.mul_(x).sum(-1).neg_()
    else:
        r = x0_score.float() - x
        value = r.add_(a, alpha=rest).mul_(a).sum(-1)
    # Sums by position first: a choice between [B, L] numbers keeps source positions out.
    distance, value = (torch.where(target, part, 0).sum(1) for part in (distance, value))
    n = target.sum(1) * x.shape[2]
    weight = (distance / n.clamp(min=1)).clamp_(min=floor)
    scale = factor / (weight * n.clamp(min=1))
    scale = torch.where(n > 0, scale if multiplier is None else scale * multiplier, 0)
    made = _torch_gradients(x, x0_teacher, x0_score, mask, scale, None, rest, count)
    return [value * scale, weight, scale, *made]


def _torch_gradients(
    x: Tensor,
    x0_teacher: Tensor,
    x0_score: Tensor,
    mask: Tensor,
    scale: Tensor,
    upstream: Tensor | None,
    rest: float,
    count: int,
) -> list[Tensor]:
    if not count:
        return []
    target = (mask != 0).unsqueeze(-1)
    s = (scale if upstream is None else scale * upstream).view(-1, 1, 1)
    # By position, since 0 times a scale that is not finite is not 0.
    s = torch.where(target, s, 0)
    a = _only(target, x0_teacher.float() - x0_score)
    if count == 1:
        return [a.mul_(s).neg_().to(x.dtype).contiguous()]
    of_teacher = _only(target, x0_score.float() - x).add_(a, alpha=2 * rest).mul_(s)
    of_x = a.mul_(s).neg()
    made = [of_x, of_teacher, a.sub_(of_teacher)]
    return [part.to(x.dtype).contiguous() for part in made]


def _only(target: Tensor, values: Tensor) -> Tensor:
    """fp32 values [B, L, d], overwritten with 0 where target [B, L, 1] is false."""
    # On the bits, as 0 times NaN is NaN; masked_fill_ takes several times longer on CPUs.
    values.view(torch.int32).bitwise_and_(-target.int())
    return values


dispatch.register(
    FORWARD,
    dispatch.Backend("triton", support.usable, _triton, support.automatic),
    dispatch.Backend("torch", lambda *tensors: None, _torch),
)
dispatch.register(
    GRADIENTS,
    dispatch.Backend("triton", support.usable, _triton_gradients, support.automatic),
    dispatch.Backend("torch", lambda *tensors: None, _torch_gradients),
)
