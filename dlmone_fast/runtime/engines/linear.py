"""Linear layers of a frozen network, with their weights as the processor reads them fastest."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlmone_fast.kernels.blocks import bias_gelu, bias_tanh

Activation = Literal["none", "gelu", "tanh"]

# oneDNN's packed weights pay off once a matrix no longer waits in a core's own cache.
_FEWEST_PACKED = 1 << 19
# Rows that the packing is made for; other numbers of rows run from the same packing.
_PACKED_ROWS = 128


class Linear:
    """activation(x W^T + b) for x of the weight's dtype.

    Args:
        layer: the layer; its tensors are shared where they already have the dtype.
        dtype: of the weight and of what comes out.
        fused: add the bias in the activation's kernel rather than in the product's.
        pack: keep a packed copy of a large weight on a CPU.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, fused: bool, pack: bool) -> None:
        weight = layer.weight.detach().to(dtype)
        self.bias = layer.bias.detach().to(dtype)
        self.fused = fused
        self.weight: Tensor | None = weight
        self.packed: Tensor | None = None
        if pack and weight.numel() >= _FEWEST_PACKED and can_pack(dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)
            self.weight = None

    def __call__(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """[..., out] of x [..., in]."""
        if self.packed is not None:
            form = "none" if activation == "gelu" else ""
            found: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.packed, self.bias, activation, [], form
            )
            return found
        assert self.weight is not None
        if activation == "none":
            return F.linear(x, self.weight, self.bias)
        if self.fused:
            product = F.linear(x, self.weight)
            activate = bias_gelu if activation == "gelu" else bias_tanh
            return activate(product, self.bias)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if activation == "gelu" else y.tanh_()


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have products from packed weights of a dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not has_fast_bf16():
        return False
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    # Operators of torch's own compiler, which it may rename: asked for, never assumed.
    ones = torch.ones(16, 16, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(ones, _PACKED_ROWS)
        torch.ops.mkldnn._linear_pointwise(ones, packed, ones[0], "gelu", [], "none")
        torch.ops.mkldnn._linear_pointwise(ones, packed, ones[0], "tanh", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


@cache
def has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 numbers itself; others convert them, slower than fp32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
