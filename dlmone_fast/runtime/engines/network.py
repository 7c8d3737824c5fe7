"""The backbone for inference: the arithmetic of `networks/backbone.py` with nothing around it.

Weights are converted once instead of at every call, the time embedding is kept per timestep, and
on a GPU what stands between two products is one kernel of `kernels/blocks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlmone_fast.kernels.blocks import WIDEST_NORM, add_layer_norm, input_layer_norm
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.networks.backbone import Backbone, at_length, present, windows
from dlmone_fast.networks.embedding import time_features
from dlmone_fast.networks.layers import LAYER_NORM_EPS, Block
from dlmone_fast.runtime.engines.linear import Linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class InferenceNetwork:
    """f(x_t, t) → x̂0 of a frozen denoiser, in one precision.

    A snapshot: the denoiser's later changes may or may not be seen. In 16 bits the products run in
    that format; the time embedding, the statistics of norms and the output projection are computed
    in fp32.

    Args:
        denoiser: the networks; fp32 tensors are shared, not copied, unless they are packed.
        precision: "fp32", "bf16" or "fp16".
        fused: use the blocks of `kernels/blocks.py`; None: on a GPU.
        pack: keep large weights packed for the CPU's products; None: where that runs.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        precision: str,
        *,
        fused: bool | None = None,
        pack: bool | None = None,
    ) -> None:
        backbone, self.config = denoiser.lm.backbone, denoiser.config
        self.device = backbone.position.weight.device
        self.dtype = DTYPES[precision]
        on_gpu = self.device.type == "cuda"
        self.fused = (on_gpu if fused is None else fused) and self.config.hidden_size <= WIDEST_NORM
        pack = (self.device.type == "cpu" and not self.fused) if pack is None else pack
        self._schedule = denoiser.schedule
        self._time_mlp = _frozen_copy(backbone.time_mlp)
        self._times: dict[int, Tensor] = {}
        self._read(backbone, pack)

    def _read(self, backbone: Backbone, pack: bool) -> None:
        fused, dtype = self.fused, self.dtype

        def pair(projection: nn.Sequential, dtype: torch.dtype) -> tuple[Linear, Linear]:
            first, _, last = projection
            assert isinstance(first, nn.Linear)
            assert isinstance(last, nn.Linear)
            return Linear(first, dtype, fused, pack), Linear(last, dtype, fused, pack)

        self._input = pair(backbone.input_projection, dtype)
        self._estimate: Tensor | None = None
        if self.config.self_conditioning:
            self._estimate = backbone.estimate_projection.weight.detach().to(dtype)
        self._position = backbone.positions().detach()
        self._source: Tensor | None = None
        if self.config.source == "aligned":
            self._source = backbone.source_projection.weight.detach().to(dtype)
        self._input_norm = _Norm.of(backbone.input_norm)
        self._layers = [_Layer.of(block, dtype, fused, pack) for block in backbone.blocks]
        pre_norm = self.config.norm == "pre"
        self._output_norm = _Norm.of(backbone.output_norm) if pre_norm else None
        self._output = pair(backbone.output_projection, torch.float32)

    def __call__(
        self, x_t: Tensor, t: Tensor, first: int = 0, estimate: Tensor | None = None
    ) -> Tensor:
        """x̂0 [B, L - first, d] in fp32 of x_t [B, L, d] in fp32 at timesteps t, int64 [B].

        Positions before `first` are attended to; what they would become is not computed.
        `estimate` [B, L, d] is an earlier x̂0, for a network with self-conditioning.
        """
        return self.body(x_t, self.time(t), first, estimate)

    def time(self, t: Tensor) -> Tensor:
        """The time embedding, fp32 [B, H]."""
        # Looking at a GPU's numbers would wait for it.
        if t.device.type == "cpu" and t.numel():
            low, high = (int(bound) for bound in torch.aminmax(t))
            if low == high:
                return self.time_of(low).expand(len(t), -1)
        return self._embed_time(t.to(self.device))

    def time_of(self, t: int) -> Tensor:
        """The time embedding of one timestep, fp32 [1, H]; computed once."""
        if t not in self._times:
            self._times[t] = self._embed_time(torch.full((1,), t, device=self.device))
        return self._times[t]

    def _embed_time(self, t: Tensor) -> Tensor:
        first, last = self._time_mlp
        features = time_features(self._schedule.network_time(t), self.config.time_dim)
        with torch.autocast(self.device.type, enabled=False):
            return F.linear(F.silu(F.linear(features, *first)), *last)

    def body(
        self,
        x_t: Tensor,
        time: Tensor,
        first_position: int = 0,
        estimate: Tensor | None = None,
    ) -> Tensor:
        """x̂0 of x_t and its time embedding: everything that depends on x_t."""
        if self.config.in_slots:
            return self._body_in_slots(x_t, time, first_position, estimate)
        read = slice(first_position, None)
        return self._x0(self._projected(x_t, estimate), time, read, None)

    def _body_in_slots(
        self, x_t: Tensor, time: Tensor, first_position: int, estimate: Tensor | None
    ) -> Tensor:
        """`body` for a source in slots; x̂0 is zero behind the target's slots."""
        length = x_t.shape[1]
        slots = self.config.slots_of(length)
        if self._source is None:
            attended = present(x_t)
            attended[:, :slots] = True
            projected = self._projected(x_t, estimate)
        else:
            source = x_t[:, slots:]
            attended = present(source)
            estimate = None if estimate is None else estimate[:, :slots]
            projected = self._projected(x_t[:, :slots], estimate)
            read = windows(source.to(self.dtype), self.config.source_window)
            projected = projected + F.linear(read, self._source)
        x0 = self._x0(projected, time, slice(first_position, slots), attended)
        return at_length(x0, length - first_position)

    def _projected(self, x_t: Tensor, estimate: Tensor | None) -> Tensor:
        first, last = self._input
        projected = last(first(x_t.to(self.dtype), "tanh"))
        if estimate is None:
            return projected
        assert self._estimate is not None
        return projected + F.linear(estimate.to(self.dtype), self._estimate)

    def _x0(self, projected: Tensor, time: Tensor, read: slice, attended: Tensor | None) -> Tensor:
        """x̂0 at the positions `read`, of what the blocks read."""
        h, norm = self._enter(projected, time), self._output_norm
        keys = None if attended is None else attended[:, None, None, :]
        h = self._pre_norm(h, norm, read, keys) if norm else self._post_norm(h, read, keys)
        first, last = self._output
        return last(first(h, "tanh"))

    def _enter(self, projected: Tensor, time: Tensor) -> Tensor:
        norm = self._input_norm
        if self.fused:
            time = time.to(projected.dtype)
            return input_layer_norm(projected, self._position, time, *norm.tensors, LAYER_NORM_EPS)
        return norm(projected + self._position[: projected.shape[1]] + time.unsqueeze(1))

    def _post_norm(self, h: Tensor, read: slice, keys: Tensor | None) -> Tensor:
        for layer in self._layers:
            # The last layer's outputs are read where something is generated only.
            queries = read if layer is self._layers[-1] else slice(None)
            attended = layer.attend(h.to(self.dtype), queries, keys)
            h = self._add_norm(attended, h[:, queries], layer.attention_norm)
            ffn = layer.ffn(h.to(self.dtype))
            if layer is self._layers[-1]:
                return self._last_norm(ffn, h, layer.ffn_norm)
            h = self._add_norm(ffn, h, layer.ffn_norm)
        return h.float()

    def _pre_norm(self, h: Tensor, output_norm: _Norm, read: slice, keys: Tensor | None) -> Tensor:
        # The one norm without a sum before it. In fp32: torch's has one dtype for all arguments.
        normed = self._layers[0].attention_norm(h.float())
        for layer, following in zip(self._layers, self._layers[1:], strict=False):
            attended = layer.attend(normed.to(self.dtype), slice(None), keys)
            normed, h = self._norm_and_sum(attended, h, layer.ffn_norm)
            ffn = layer.ffn(normed.to(self.dtype))
            normed, h = self._norm_and_sum(ffn, h, following.attention_norm)
        layer = self._layers[-1]
        attended = layer.attend(normed.to(self.dtype), read, keys)
        normed, h = self._norm_and_sum(attended, h[:, read], layer.ffn_norm)
        return self._last_norm(layer.ffn(normed.to(self.dtype)), h, output_norm)

    def _add_norm(self, x: Tensor, residual: Tensor, norm: _Norm) -> Tensor:
        if not self.fused:
            return norm(residual + x)
        found = add_layer_norm(x, residual, *norm.tensors, LAYER_NORM_EPS)
        assert isinstance(found, Tensor)
        return found

    def _norm_and_sum(self, x: Tensor, residual: Tensor, norm: _Norm) -> tuple[Tensor, Tensor]:
        if not self.fused:
            total = residual + x
            return norm(total), total
        found = add_layer_norm(x, residual, *norm.tensors, LAYER_NORM_EPS, return_sum=True)
        assert isinstance(found, tuple)
        return found

    def _last_norm(self, x: Tensor, residual: Tensor, norm: _Norm) -> Tensor:
        # What the fp32 output projection reads: rounding it to 16 bits would show in every output.
        return norm(x.float() + residual)


@dataclass(frozen=True)
class _Norm:
    """A LayerNorm's weight and bias, in fp32."""

    tensors: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, norm: nn.Module) -> _Norm:
        assert isinstance(norm, nn.LayerNorm)
        return cls((norm.weight.detach().float(), norm.bias.detach().float()))

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), *self.tensors, LAYER_NORM_EPS)


@dataclass(frozen=True)
class _Layer:
    """One transformer block."""

    heads: int
    qkv: Linear
    output: Linear
    ffn_in: Linear
    ffn_out: Linear
    attention_norm: _Norm
    ffn_norm: _Norm

    @classmethod
    def of(cls, block: nn.Module, dtype: torch.dtype, fused: bool, pack: bool) -> _Layer:
        assert isinstance(block, Block)
        attention = block.attention

        def linear(layer: nn.Linear) -> Linear:
            return Linear(layer, dtype, fused, pack)

        return cls(
            heads=attention.num_heads,
            qkv=linear(attention.qkv),
            output=linear(attention.output),
            ffn_in=linear(block.ffn_in),
            ffn_out=linear(block.ffn_out),
            attention_norm=_Norm.of(block.attention_norm),
            ffn_norm=_Norm.of(block.ffn_norm),
        )

    def attend(self, h: Tensor, queries: slice, keys: Tensor | None = None) -> Tensor:
        """Self-attention of some positions over those that `keys` bool [B, 1, 1, L] marks."""
        batch, length, hidden = h.shape
        qkv = self.qkv(h).view(batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q[:, :, queries], k, v, attn_mask=keys)
        return self.output(mixed.transpose(1, 2).reshape(batch, -1, hidden))

    def ffn(self, h: Tensor) -> Tensor:
        """The feed-forward network [B, L, H]."""
        return self.ffn_out(self.ffn_in(h, "gelu"))


def _frozen_copy(projection: nn.Sequential) -> list[tuple[Tensor, Tensor]]:
    layers = [layer for layer in projection if isinstance(layer, nn.Linear)]
    return [(layer.weight.detach().float(), layer.bias.detach().float()) for layer in layers]
