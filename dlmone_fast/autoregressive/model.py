"""The encoder-decoder transformer (Vaswani et al., arXiv 1706.03762) with tied embeddings.

With `norm = "post"` it has BERT's form, so that it can start from a BERT's layers.
B = batch, S = source positions, L = target positions, H = width, V = target vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlmone_fast.autoregressive.config import ModelConfig
from dlmone_fast.autoregressive.layers import (
    LAYER_NORM_EPS,
    CrossAttention,
    Dropout,
    FeedForward,
    KeysValues,
    Layers,
    Residual,
    SelfAttention,
    attend,
)


@dataclass
class DecodingState:
    """The decoder's keys and values of the tokens so far, and of the source."""

    written: list[KeysValues]
    """Of each layer, [B, N, positions, D]; filled up to the tokens so far."""
    memory: list[KeysValues]
    """Of each layer, [B, N, S, D]."""
    mask: Tensor | None
    """Added to the scores of source positions, [B, 1, 1, S]."""

    def select(self, rows: Tensor) -> DecodingState:
        """The state of other rows: those that go on, or the best beams' parents."""

        def chosen(pair: KeysValues) -> KeysValues:
            return KeysValues(*(tensor.index_select(0, rows) for tensor in pair))

        mask = None if self.mask is None else self.mask.index_select(0, rows)
        return DecodingState(
            [chosen(pair) for pair in self.written], [chosen(pair) for pair in self.memory], mask
        )


class Embedding(nn.Module):
    """Token and position embeddings of one side."""

    def __init__(self, tokens: nn.Embedding, positions: int, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = nn.Embedding(positions, config.width)
        self.post = config.norm == "post"
        if self.post:
            self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids: Tensor, dtype: torch.dtype, first: int = 0) -> Tensor:
        """Embeddings [B, L, H] of ids [B, L], whose first one stands at position `first`."""
        x = self.tokens(ids)
        if not self.post:
            x = x * math.sqrt(x.shape[-1])
        x = x + self.positions.weight[first : first + ids.shape[1]]
        x = self.dropout(x.to(dtype))
        return self.norm(x) if self.post else x


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = config.width, config.dropout, config.norm == "pre"
        self.attention = SelfAttention(config.width, config.heads)
        self.attention_sum = Residual(*sizes)
        self.ffn = FeedForward(config.width, config.ffn)
        self.ffn_sum = Residual(*sizes)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention_sum.after(x, self.attention(self.attention_sum.before(x), mask))
        result: Tensor = self.ffn_sum.after(x, self.ffn(self.ffn_sum.before(x)))
        return result


class DecoderLayer(nn.Module):
    """Self-attention to what was written, attention to the source, a feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = config.width, config.dropout, config.norm == "pre"
        self.attention = SelfAttention(config.width, config.heads)
        self.attention_sum = Residual(*sizes)
        self.cross = CrossAttention(config.width, config.heads)
        self.cross_sum = Residual(*sizes)
        self.ffn = FeedForward(config.width, config.ffn)
        self.ffn_sum = Residual(*sizes)

    def forward(
        self,
        x: Tensor,
        memory: KeysValues,
        source_mask: Tensor | None,
        causal: Tensor | None,
        written: KeysValues | None = None,
        position: int = 0,
    ) -> Tensor:
        """Whole targets x [B, L, H] under a causal mask, or with `written` one token [B, 1, H]."""
        query, own = self.attention.project(self.attention_sum.before(x))
        if written is not None:
            written.keys[:, :, position] = own.keys[:, :, 0]
            written.values[:, :, position] = own.values[:, :, 0]
            own = KeysValues(*(tensor[:, :, : position + 1] for tensor in written))
        mixed = self.attention.output(attend(query, own, causal))
        x = self.attention_sum.after(x, mixed)
        x = self.cross_sum.after(x, self.cross(self.cross_sum.before(x), memory, source_mask))
        result: Tensor = self.ffn_sum.after(x, self.ffn(self.ffn_sum.before(x)))
        return result


class EncoderDecoder(nn.Module):
    """Source ids to scores of the target's next token.

    Args:
        config: sizes, both vocabularies' among them.
        seed: of the first weights; the caller's random numbers are left alone.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(config)

    def _build(self, config: ModelConfig) -> None:
        target = nn.Embedding(config.target_vocab, config.width)
        source = target if config.shared_vocab else nn.Embedding(config.source_vocab, config.width)
        self.source = Embedding(source, config.source_positions, config)
        self.target = Embedding(target, config.target_positions, config)
        self.encoder = Layers(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = Layers(DecoderLayer(config) for _ in range(config.decoder_layers))
        if config.norm == "pre":
            self.encoder_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
            self.decoder_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        else:
            self.output = nn.Linear(config.width, config.width)
        self.bias = nn.Parameter(torch.zeros(config.target_vocab))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=config.width**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products and activations: the linear layers'."""
        return next(iter(self.encoder)).ffn.up.weight.dtype

    def forward(self, source: Tensor, padded: Tensor | None, target: Tensor) -> Tensor:
        """Hidden states [B, L, H] after each token of target [B, L], its first mark included.

        Args:
            source: int64 [B, S].
            padded: bool [B, S], True where a source has no token; None: nowhere.
        """
        memory = self.encode(source, padded)
        mask = self._mask(padded)
        length = target.shape[1]
        causal = torch.full((length, length), -math.inf, dtype=self.dtype).triu_(1)
        x = self.target(target, self.dtype)
        for layer in self.decoder:
            x = layer(x, layer.cross.project(memory), mask, causal)
        return self._last(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., V] of the next token, in the dtype of `hidden` [..., H]."""
        table = self.target.tokens.weight
        return F.linear(hidden, table.to(hidden.dtype), self.bias.to(hidden.dtype))

    def encode(self, source: Tensor, padded: Tensor | None) -> Tensor:
        """The encoded source [B, S, H]."""
        x = self.source(source, self.dtype)
        mask = self._mask(padded)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x) if self.config.norm == "pre" else x

    def start(self, source: Tensor, padded: Tensor | None, positions: int) -> DecodingState:
        """The state before the first token, with room for `positions` tokens."""
        memory = self.encode(source, padded)
        config = self.config
        shape = len(source), config.heads, positions, config.width // config.heads
        written = [
            KeysValues(memory.new_zeros(shape), memory.new_zeros(shape)) for _ in self.decoder
        ]
        projected = [layer.cross.project(memory) for layer in self.decoder]
        return DecodingState(written, projected, self._mask(padded))

    def step(self, ids: Tensor, position: int, state: DecodingState) -> Tensor:
        """Scores [B, V], fp32, of the token after `ids` [B], which stand at `position`."""
        x = self.target(ids[:, None], self.dtype, position)
        for layer, memory, written in zip(self.decoder, state.memory, state.written, strict=True):
            x = layer(x, memory, state.mask, None, written, position)
        return self.logits(self._last(x)[:, 0]).float()

    def _mask(self, padded: Tensor | None) -> Tensor | None:
        if padded is None:
            return None
        mask = torch.zeros(padded.shape, dtype=self.dtype)
        return mask.masked_fill_(padded, -math.inf)[:, None, None]

    def _last(self, x: Tensor) -> Tensor:
        last: Tensor = self.decoder_norm(x) if self.config.norm == "pre" else self.output(x)
        return last
