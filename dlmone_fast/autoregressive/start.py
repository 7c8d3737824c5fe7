"""The start of an encoder-decoder from a pretrained encoder (compare Rothe et al., arXiv
1907.12461).

The encoder takes all layers, the decoder every other one: 1, 3, 5 of six. Cross-attention starts
as that layer's self-attention. Embeddings are the pretrained ones of the pieces that are left.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlmone_fast.autoregressive.layers import CrossAttention, FeedForward, SelfAttention
from dlmone_fast.autoregressive.model import Embedding, EncoderDecoder
from dlmone_fast.models.pretrained import Pretrained
from dlmone_fast.tokenizer import Tokenizer


@torch.no_grad()
def start_from(model: EncoderDecoder, pretrained: Pretrained, tokenizer: Tokenizer) -> None:
    """Copy pretrained weights into a model of the same sizes.

    Raises:
        ModelFileError: `tokenizer` has a piece that the pretrained vocabulary lacks.
    """
    model.target.tokens.weight.copy_(pretrained.rows_of(tokenizer))
    for side in (model.source, model.target):
        _embedding(side, pretrained)
    for index, layer in enumerate(model.encoder):
        _attention(layer.attention, pretrained, index)
        _copy(layer.attention_sum.norm, pretrained.layer(index, "attention.output.LayerNorm"))
        _feed_forward(layer.ffn, layer.ffn_sum.norm, pretrained, index)
    for index, layer in zip(_decoder_layers(pretrained.layers), model.decoder, strict=True):
        norm = pretrained.layer(index, "attention.output.LayerNorm")
        _attention(layer.attention, pretrained, index)
        _cross_attention(layer.cross, pretrained, index)
        for part in (layer.attention_sum, layer.cross_sum):
            _copy(part.norm, norm)
        _feed_forward(layer.ffn, layer.ffn_sum.norm, pretrained, index)


def _decoder_layers(layers: int) -> list[int]:
    return list(range(1, layers, 2)) or [0]


def _embedding(side: Embedding, pretrained: Pretrained) -> None:
    tensors = pretrained.tensors
    count = len(side.positions.weight)
    positions = tensors["embeddings.position_embeddings.weight"][:count]
    # BERT adds the type of its first segment to every position.
    side.positions.weight.copy_(positions + tensors["embeddings.token_type_embeddings.weight"][0])
    for kind in ("weight", "bias"):
        getattr(side.norm, kind).copy_(tensors[f"embeddings.LayerNorm.{kind}"])


def _attention(attention: SelfAttention, pretrained: Pretrained, index: int) -> None:
    parts = [pretrained.layer(index, f"attention.self.{n}") for n in ("query", "key", "value")]
    _copy(attention.qkv, _joined(parts))
    _copy(attention.output, pretrained.layer(index, "attention.output.dense"))


def _cross_attention(cross: CrossAttention, pretrained: Pretrained, index: int) -> None:
    query, key, value = (
        pretrained.layer(index, f"attention.self.{n}") for n in ("query", "key", "value")
    )
    _copy(cross.query, query)
    _copy(cross.memory, _joined([key, value]))
    _copy(cross.output, pretrained.layer(index, "attention.output.dense"))


def _feed_forward(ffn: FeedForward, norm: nn.LayerNorm, pretrained: Pretrained, index: int) -> None:
    _copy(ffn.up, pretrained.layer(index, "intermediate.dense"))
    _copy(ffn.down, pretrained.layer(index, "output.dense"))
    _copy(norm, pretrained.layer(index, "output.LayerNorm"))


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {kind: torch.cat([part[kind] for part in parts]) for kind in ("weight", "bias")}


def _copy(module: nn.Linear | nn.LayerNorm, tensors: dict[str, Tensor]) -> None:
    for kind, tensor in tensors.items():
        getattr(module, kind).copy_(tensor)
