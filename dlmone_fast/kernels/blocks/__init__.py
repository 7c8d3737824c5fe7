"""Fused element-by-element steps of a transformer, for inference."""

from dlmone_fast.kernels.blocks.op import (
    WIDEST_NORM,
    add_layer_norm,
    bias_gelu,
    bias_tanh,
    input_layer_norm,
)

__all__ = ["WIDEST_NORM", "add_layer_norm", "bias_gelu", "bias_tanh", "input_layer_norm"]
