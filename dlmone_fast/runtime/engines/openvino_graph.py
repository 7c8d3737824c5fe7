"""The backbone as an OpenVINO model, operation by operation.

`openvino.convert_model` would trace it with torch.jit, which takes seconds and keeps what it traced
for as long as the process lives: measured with torch 2.13, 3.9 MB for each load of a network of two
layers. Nothing here is kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from dlmone_fast.networks import Backbone
from dlmone_fast.networks.layers import LAYER_NORM_EPS, Attention, Block


def model_of(openvino: Any, backbone: Backbone) -> Any:
    """x̂0 [B, L, d] of x_t [B, L, d] and the time's vector [B, H], as an `openvino.Model`.

    The time embedding stays outside: its frequencies do not survive 16 bits, and a step's vector
    is the same for every call.

    Args:
        openvino: the module.
        backbone: in fp32 on a CPU; the model shares its weights.
    """
    config, ops = backbone.config, _Operations(openvino.opset13)
    length = -1 if config.in_slots else config.seq_len
    x_t = ops.library.parameter([-1, length, config.embedding_dim], np.float32, "x_t")
    t_vector = ops.library.parameter([-1, config.hidden_size], np.float32, "t_vector")
    h, keys = ops.enter(x_t, backbone)
    h = ops.add(h, ops.library.unsqueeze(t_vector, 1))
    h = ops.norm(h, backbone.input_norm)
    for number, block in enumerate(backbone.blocks):
        assert isinstance(block, Block)
        h = ops.block(h, block, f"blocks.{number}", keys)
    if config.source == "masked":
        h = ops.rows(h, config.target_slots, 1)
    if config.norm == "pre":
        assert isinstance(backbone.output_norm, nn.LayerNorm)
        h = ops.norm(h, backbone.output_norm)
    x0 = ops.projection(h, backbone.output_projection, "output_projection")
    return openvino.Model([x0], [x_t, t_vector], "backbone")


class _Operations:
    """The parts of `networks/layers.py` in OpenVINO's operations; each takes and returns nodes.

    Products and their biases bear the names of the modules that they come from.
    """

    def __init__(self, library: Any) -> None:
        self.library = library
        self.add = library.add

    def weight(self, tensor: Tensor) -> Any:
        """A constant in the tensor's own memory."""
        return self.library.constant(tensor.detach().numpy(), shared_memory=True)

    def enter(self, x_t: Any, backbone: Backbone) -> tuple[Any, Any]:
        """`Backbone.enter` with positions: what the blocks read, and the keys that are attended to
        [B, 1, 1, L'], or None for all."""
        config, project = backbone.config, backbone.input_projection
        positions = self.weight(backbone.positions())
        if not config.in_slots:
            h = self.projection(x_t, project, "input_projection")
            return self.add(h, self.rows(positions, config.seq_len)), None
        if config.source == "aligned":
            slots, source = self.library.split(x_t, 1, 2).outputs()
            h = self.projection(slots, project, "input_projection")
            weight = self.weight(backbone.source_projection.weight)
            read = self.windows(source, config.source_window)
            h = self.add(h, self.library.matmul(read, weight, False, True))
            attended = self.present(source)
        else:
            h = self.projection(x_t, project, "input_projection")
            is_slot = np.arange(config.seq_len) < config.target_slots
            slots = self.rows(self.library.constant(is_slot), self.length(x_t))
            attended = self.library.logical_or(self.present(x_t), slots)
        h = self.add(h, self.rows(positions, self.length(h)))
        return h, self.library.unsqueeze(attended, [1, 2])

    def present(self, x: Any) -> Any:
        """Whether each position of x [B, L, d] holds anything, [B, L]."""
        largest = self.library.reduce_max(self.library.absolute(x), [-1])
        return self.library.greater(largest, np.float32(0))

    def windows(self, x: Any, size: int) -> Any:
        """Each position of x [B, L, d] beside its neighbours, zeros at the ends."""
        if size == 1:
            return x
        side, zero = size // 2, np.float32(0)
        padded = self.library.pad(x, [0, side, 0], [0, side, 0], "constant", zero)
        shifted = [
            self.library.slice(padded, [i], self.add(self.length(x), np.int64(i)), [1], [1])
            for i in range(size)
        ]
        return self.library.concat(shifted, -1)

    def length(self, x: Any) -> Any:
        """Positions of x [B, L, …], as one number."""
        return self.library.gather(self.library.shape_of(x), [1], 0)

    def rows(self, x: Any, count: Any, axis: int = 0) -> Any:
        """The first `count` rows of x along an axis."""
        count = [count] if isinstance(count, int) else count
        return self.library.slice(x, [0], count, [1], [axis])

    def linear(self, h: Any, layer: nn.Module, name: str) -> Any:
        assert isinstance(layer, nn.Linear)
        product = self.library.matmul(h, self.weight(layer.weight), False, True)
        product.set_friendly_name(f"{name}.product")
        result = self.add(product, self.weight(layer.bias))
        result.set_friendly_name(f"{name}.bias")
        return result

    def projection(self, h: Any, layers: nn.Sequential, name: str) -> Any:
        first, _, last = layers
        h = self.library.tanh(self.linear(h, first, f"{name}.0"))
        return self.linear(h, last, f"{name}.2")

    def norm(self, h: Any, layer: nn.LayerNorm) -> Any:
        last = self.library.constant([-1], np.int64)
        h = self.library.mvn(h, last, True, LAYER_NORM_EPS, "inside_sqrt")
        h = self.library.multiply(h, self.weight(layer.weight))
        return self.add(h, self.weight(layer.bias))

    def block(self, h: Any, block: Block, name: str, keys: Any = None) -> Any:
        attention = block.attention
        if block.pre_norm:
            attended = self.attend(self.norm(h, block.attention_norm), attention, name, keys)
            h = self.add(h, attended)
            return self.add(h, self.ffn(self.norm(h, block.ffn_norm), block, name))
        h = self.norm(self.add(h, self.attend(h, attention, name, keys)), block.attention_norm)
        return self.norm(self.add(h, self.ffn(h, block, name)), block.ffn_norm)

    def attend(self, h: Any, attention: Attention, name: str, keys: Any = None) -> Any:
        heads, hidden = attention.num_heads, attention.output.in_features
        qkv = self.linear(h, attention.qkv, f"{name}.attention.qkv")
        # A zero keeps the size of its dimension.
        qkv = self.library.reshape(qkv, [0, 0, 3, heads, hidden // heads], True)
        parts = self.library.split(self.library.transpose(qkv, [2, 0, 3, 1, 4]), 0, 3)
        q, k, v = (self.library.squeeze(part, 0) for part in parts.outputs())
        mixed = self.library.scaled_dot_product_attention(q, k, v, keys)
        mixed = self.library.transpose(mixed, [0, 2, 1, 3])
        mixed = self.library.reshape(mixed, [0, 0, hidden], True)
        return self.linear(mixed, attention.output, f"{name}.attention.output")

    def ffn(self, h: Any, block: Block, name: str) -> Any:
        h = self.library.gelu(self.linear(h, block.ffn_in, f"{name}.ffn_in"), "erf")
        return self.linear(h, block.ffn_out, f"{name}.ffn_out")
