"""An autoregressive decoder, the usual alternative to a diffusion LM, in plain PyTorch.

It is pre-norm, of GPT-2's form, with a key-value cache of fixed size. Weights are random, because
time does not depend on them. Generation is greedy and always of `NEW_TOKENS` tokens: the end of the
text is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlmone_fast.config import ModelConfig
from dlmone_fast.text_tokenizer import TextTokenizer

NEW_TOKENS = 20
POSITIONS = 128
"""Prompt and answer together are at most so long."""

WEIGHT_STD = 0.05
"""Spread of random weights, wide enough that an answer depends on its prompt."""

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Cache:
    """Keys and values [B, heads, S, H / heads] of each layer, S positions from the start."""

    keys: list[Tensor]
    values: list[Tensor]


class Decoder(nn.Module):
    """Token ids to hidden states [B, L, H]; the output projection is the embedding's table.

    Args:
        config: width, layers, heads and vocabulary; what only a diffusion LM has is not used.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(config.vocab_size, width)
            self.positions = nn.Embedding(POSITIONS, width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.norm = nn.LayerNorm(width)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=WEIGHT_STD)
        self.eval().requires_grad_(False)

    def forward(
        self,
        ids: Tensor,
        places: Tensor,
        visible: Tensor,
        slots: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states [B, n, H] of n tokens.

        Args:
            ids: int64 [B, n].
            places: the tokens' positions in their texts, int64 [B, n].
            visible: bool [B, 1, n, S], what each token may look at: all of `cache`, or without
                one the n tokens.
            slots: where in the cache the tokens go, int64 [n].
        """
        x = self.embedding(ids) + self.positions(places)
        for i, block in enumerate(self.blocks):
            stored = None if cache is None else (cache.keys[i], cache.values[i])
            x = block(x, visible, slots, stored)
        normed: Tensor = self.norm(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., V] of the next token."""
        return F.linear(hidden, self.embedding.weight)

    def cache(self, batch: int, size: int) -> Cache:
        """An empty cache."""
        config, like = self.config, self.embedding.weight
        shape = (batch, config.num_heads, size, config.hidden_size // config.num_heads)

        def empty() -> list[Tensor]:
            # Zeros: what is not visible is multiplied by zero, so it has to be finite.
            return [like.new_zeros(shape) for _ in range(config.num_layers)]

        return Cache(empty(), empty())


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, config.ffn_size), nn.Linear(config.ffn_size, width)

    def forward(
        self, x: Tensor, visible: Tensor, slots: Tensor | None, stored: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """x [B, n, H]; the tokens' keys and values are put at `slots` of `stored`."""
        projected = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        if stored is not None and slots is not None:
            key = stored[0].index_copy_(2, slots, key)
            value = stored[1].index_copy_(2, slots, value)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        inner = F.gelu(self.up(self.ffn_norm(x)), approximate="tanh")
        result: Tensor = x + self.down(inner)
        return result


@dataclass(frozen=True)
class Padded:
    """Prompts of several lengths side by side, padded on the left.

    Attributes:
        ids: int64 [B, P].
        places: positions of P + NEW_TOKENS tokens in their texts, int64 [B, S].
        visible: bool [B, 1, S, S], what each of them may look at.
    """

    ids: Tensor
    places: Tensor
    visible: Tensor


def padded(prompts: Ids, pad_id: int, device: torch.device) -> Padded:
    """The prompts with room for an answer.

    Raises:
        ValueError: they are longer than a decoder has positions for.
    """
    width = max(map(len, prompts))
    size = width + NEW_TOKENS
    if size > POSITIONS:
        raise ValueError(
            f"prompts: expected at most {POSITIONS - NEW_TOKENS} tokens, got {width}; cut them"
        )
    padding = torch.tensor([width - len(ids) for ids in prompts])
    rows = [[pad_id] * (width - len(ids)) + list(ids) for ids in prompts]
    slots = torch.arange(size)
    places = (slots - padding[:, None]).clamp(min=0)
    visible = (slots <= slots[:, None]) & (slots >= padding[:, None, None])
    # Padding sees itself: attention to nothing is not a number.
    visible = visible | torch.eye(size, dtype=torch.bool)
    return Padded(torch.tensor(rows).to(device), places.to(device), visible[:, None].to(device))


class CachedGreedy:
    """Greedy generation: prompts' ids to `NEW_TOKENS` ids each.

    Args:
        decoder: the network.
        tokenizer: says which ids pad and end a text.
        exact: the same network in fp32, that choices are checked against; None: `decoder`.
        compile_mode: of torch.compile for the step of one token; None: not compiled.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: TextTokenizer,
        exact: Decoder | None = None,
        compile_mode: str | None = None,
    ) -> None:
        self.network, self.exact_decoder = decoder, exact or decoder
        self.pad_id, self.end_id = tokenizer.pad_id, tokenizer.sep_id
        self._compiled = compile_mode is not None
        self._step: Callable[..., Tensor] = self.next_tokens
        if compile_mode is not None:
            self._step = torch.compile(self.next_tokens, dynamic=False, mode=compile_mode)
        self._cache: Cache | None = None

    @torch.inference_mode()
    def __call__(self, prompts: Ids) -> list[list[int]]:
        """The answers' ids; the prompt is one pass, and so is every further token."""
        given = padded(prompts, self.pad_id, self.network.embedding.weight.device)
        batch, width = given.ids.shape
        around = (given.places, given.visible, self._cache_of(batch, width + NEW_TOKENS))
        found = given.ids.new_empty(batch, NEW_TOKENS)
        slot = torch.arange(width, device=found.device)
        token = self.next_tokens(given.ids, slot, *around)
        slot = slot[-1:].clone()
        for i in range(NEW_TOKENS):
            found[:, i : i + 1] = token
            if i + 1 < NEW_TOKENS:
                slot += 1
                if self._compiled:
                    # A CUDA graph writes its result where the one before it wrote its own.
                    token = token.clone()
                    torch.compiler.cudagraph_mark_step_begin()
                token = self._step(token, slot, *around)
        answers: list[list[int]] = found.tolist()
        return answers

    def next_tokens(
        self, ids: Tensor, slots: Tensor, places: Tensor, visible: Tensor, cache: Cache
    ) -> Tensor:
        """The most likely token [B, 1] after `ids` [B, n], which go to `slots` [n] of the cache."""
        here = places.index_select(1, slots), visible.index_select(2, slots)
        hidden = self.network(ids, *here, slots, cache)
        logits = self.network.logits(hidden[:, -1])
        return without(self.end_id, logits).argmax(-1, keepdim=True)

    @torch.inference_mode()
    def exact(self, prompts: Ids, answers: Ids) -> Tensor:
        """fp32 scores [B, NEW_TOKENS, V] of each next token, in one pass without a cache."""
        decoder = self.exact_decoder
        given = padded(prompts, self.pad_id, decoder.embedding.weight.device)
        width = given.ids.shape[1]
        ids = torch.cat([given.ids, torch.tensor(answers).to(given.ids)], 1)
        hidden = decoder(ids, given.places, given.visible)[:, width - 1 : -1]
        return without(self.end_id, decoder.logits(hidden))

    def _cache_of(self, batch: int, size: int) -> Cache:
        # Kept between calls, as its memory's address is part of a CUDA graph.
        kept = self._cache
        if kept is None or kept.keys[0].shape[0::2] != (batch, size):
            kept = self._cache = self.network.cache(batch, size)
            for tensor in (*kept.keys, *kept.values):
                torch._dynamo.mark_static_address(tensor)
        return kept


def complaint(answers: Ids, exact: Tensor, tolerance: float) -> str | None:
    """The fault of greedy answers; None: they are right.

    That every token is the best one after those before it is what greedy generation without a
    cache gives, by induction; a near tie may fall either way.

    Args:
        exact: fp32 scores [B, NEW_TOKENS, V] of each next token, after the answers' own tokens.
        tolerance: what the best score may exceed the chosen one by, in standard deviations of a
            position's scores.
    """
    if [len(row) for row in answers] != [NEW_TOKENS] * len(exact):
        return f"not {NEW_TOKENS} tokens for each of {len(exact)} prompts"
    chosen = exact.gather(-1, torch.tensor(answers).to(exact.device)[..., None])[..., 0]
    finite = exact.where(exact.isfinite(), exact.amax(-1, keepdim=True))
    gap = float(((exact.amax(-1) - chosen) / finite.std(-1)).max())
    return None if gap <= tolerance else f"a token's score is {gap:.3g} deviations below the best"


def same_choices(answers: Ids, exact: Tensor) -> float:
    """The share of tokens that are fp32's choice after the same tokens."""
    return float((exact.argmax(-1).cpu() == torch.tensor(answers)).float().mean())


def without(end_id: int, logits: Tensor) -> Tensor:
    """The scores [..., V], changed in place so that the text's end is never the best."""
    logits[..., end_id] = float("-inf")
    return logits
