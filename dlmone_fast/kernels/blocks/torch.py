"""The fused blocks in torch, on any device."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, return_sum: bool
) -> tuple[Tensor, Tensor]:
    total = x.float() + residual
    normed = _norm(total, weight, bias, eps).to(x.dtype)
    return normed.contiguous(), total.to(x.dtype).contiguous() if return_sum else x.new_empty(0)


def input_layer_norm(
    projected: Tensor, position: Tensor, time: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    total = projected.float() + position[: projected.shape[1]]
    total = total.add_(time.unsqueeze(1))
    return _norm(total, weight, bias, eps).to(projected.dtype).contiguous()


def _norm(total: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(total, (total.shape[-1],), weight.float(), bias.float(), eps)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x.float() + bias).to(x.dtype).contiguous()


def bias_tanh(x: Tensor, bias: Tensor) -> Tensor:
    return (x.float() + bias).tanh_().to(x.dtype).contiguous()
