"""The start of a teacher from a pretrained BERT-family encoder (`model.start_from`).

Trunk, positions, segment types and the first LayerNorm are taken over. The space that is diffused
is made of the leading principal components of the word embeddings, and the input projection is
solved so that a clean latent gives the pretrained embedding back: the trunk begins where its
pretraining ended. (DiffuSeq's own `use_plm_init` keeps the trunk and learns new embeddings, 768
wide: the trunk has to unlearn its inputs, and noise in so many dimensions hides nothing.)
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlmone_fast.config import Config
from dlmone_fast.errors import ConfigError
from dlmone_fast.models.pretrained import Pretrained
from dlmone_fast.networks import DiffusionLM
from dlmone_fast.networks.layers import LAYER_NORM_EPS, Block
from dlmone_fast.tokenizer import SPECIAL_TOKENS, Tokenizer

# Clean latents, of unit variance a channel, stay where tanh is nearly linear.
_INPUT_SCALE = 0.3


def with_start(config: Config, start: Pretrained) -> Config:
    """The configuration with the sizes of the encoder that it starts from.

    Raises:
        ConfigError: the encoder has fewer positions than a sequence, another LayerNorm, or is
            narrower than the embedding; or the source is aligned.
    """
    model = config.model
    for wrong, reason in (
        (model.source == "aligned", "its trunk reads sequences: set model.source to masked"),
        (model.longest_part > start.positions, f"it has {start.positions} positions"),
        (model.embedding_dim > start.width, f"its width is {start.width}: lower embedding_dim"),
        (start.norm_eps != LAYER_NORM_EPS, f"its LayerNorm adds {start.norm_eps:g}, not 1e-12"),
    ):
        if wrong:
            raise ConfigError(
                f"model.start_from: {model.start_from!r} cannot start this model: {reason}; set "
                "model to what it has, or use another folder"
            )
    sizes = replace(
        model,
        hidden_size=start.width,
        num_layers=start.layers,
        num_heads=start.heads,
        ffn_size=start.ffn,
        norm="post",
        normalize_embedding=True,
        max_positions=min(start.positions, max(model.max_positions, model.longest_part)),
    )
    return replace(config, model=sizes)


@torch.no_grad()
def start_from(lm: DiffusionLM, start: Pretrained, tokenizer: Tokenizer) -> None:
    """Give a new network of the encoder's sizes its weights.

    Raises:
        ModelFileError: `tokenizer` has a piece that the encoder has no embedding of.
    """
    words = start.rows_of(tokenizer)
    lm.tokens.weight.copy_(principal_components(words, lm.config.embedding_dim))
    backbone = lm.backbone
    _solve_input(backbone.input_projection, lm.tokens.table(), words)
    _positions(lm, start)
    for kind in ("weight", "bias"):
        getattr(backbone.input_norm, kind).copy_(start.tensors[f"embeddings.LayerNorm.{kind}"])
    for parameter in backbone.time_mlp[2].parameters():
        parameter.zero_()
    for index, block in enumerate(backbone.blocks):
        assert isinstance(block, Block)
        _block(block, start, index)


def principal_components(words: Tensor, width: int) -> Tensor:
    """Rows [V, width] of norm sqrt(width): leading principal components of words [V, H].

    Half-whitened: each component is divided by the root of its standard deviation, so that the
    first ones do not drown the rest. Special tokens do not count in mean and components.
    """
    text = words[len(SPECIAL_TOKENS) :]
    mean = text.mean(0)
    _, _, directions = torch.linalg.svd(text - mean, full_matrices=False)
    components = (words - mean) @ directions[:width].T
    spread = components[len(SPECIAL_TOKENS) :].std(0).clamp(min=1e-6)
    return F.normalize(components / spread.sqrt(), dim=-1) * math.sqrt(width)


def _solve_input(projection: nn.Sequential, table: Tensor, words: Tensor) -> None:
    """Make projection(table [V, d]) as near to words [V, H] as least squares allows.

    The first layer turns a latent into H channels without loss, small enough for its tanh; the
    second turns them back and applies the linear map that fits best.
    """
    first, _, last = projection
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    hidden, width = first.weight.shape
    ones = torch.ones(len(table), 1)
    fit = torch.linalg.lstsq(torch.cat([table, ones], 1), words).solution
    numbers = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(hidden, width, generator=numbers))
    scale = _INPUT_SCALE / table.square().mean().sqrt()
    first.weight.copy_(scale * basis)
    first.bias.zero_()
    last.weight.copy_(fit[:width].T @ basis.T / scale)
    last.bias.copy_(fit[width])


def _positions(lm: DiffusionLM, start: Pretrained) -> None:
    backbone, count = lm.backbone, lm.config.max_positions
    positions = start.tensors["embeddings.position_embeddings.weight"][:count]
    types = start.tensors["embeddings.token_type_embeddings.weight"]
    if lm.config.source == "masked":
        backbone.position.weight.copy_(positions)
        # The source is BERT's first segment, the target its second.
        backbone.part.weight.copy_(types[[0, min(1, len(types) - 1)]])
    else:
        backbone.position.weight.copy_(positions + types[0])


def _block(block: Block, start: Pretrained, index: int) -> None:
    parts = [start.layer(index, f"attention.self.{name}") for name in ("query", "key", "value")]
    for kind in ("weight", "bias"):
        joined = torch.cat([part[kind] for part in parts])
        getattr(block.attention.qkv, kind).copy_(joined)
    for module, part in (
        (block.attention.output, "attention.output.dense"),
        (block.attention_norm, "attention.output.LayerNorm"),
        (block.ffn_in, "intermediate.dense"),
        (block.ffn_out, "output.dense"),
        (block.ffn_norm, "output.LayerNorm"),
    ):
        for kind, tensor in start.layer(index, part).items():
            getattr(module, kind).copy_(tensor)
