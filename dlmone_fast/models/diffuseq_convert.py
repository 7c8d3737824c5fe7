"""From DiffuSeq's tensors and settings to this package's: one key table and one function."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.config import DiffusionConfig, ModelConfig
from dlmone_fast.errors import ConfigError, ModelFileError
from dlmone_fast.models.plainfiles import StrPath
from dlmone_fast.models.tensors import check_names, check_tensors

ARGS_NAME = "training_args.json"
ONLY_V1 = "only checkpoints of DiffuSeq's first version can be imported"
_LAYER = re.compile(r"input_transformers\.layer\.(\d{1,3})\.")

# Our module names ← DiffuSeq's; each has a weight and a bias.
_TRUNK = {
    "backbone.time_mlp.0": "time_embed.0",
    "backbone.time_mlp.2": "time_embed.2",
    "backbone.input_projection.0": "input_up_proj.0",
    "backbone.input_projection.2": "input_up_proj.2",
    "backbone.input_norm": "LayerNorm",
    "backbone.output_projection.0": "output_down_proj.0",
    "backbone.output_projection.2": "output_down_proj.2",
}
_BLOCK = {
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
# The rows of our fused projection, in this order.
_QKV = ("query", "key", "value")

# The output head of both embedding matrices, which differ in the EMA files (see `convert`).
EMBEDDINGS = {"raw": "lm_head.weight", "ema": "word_embedding.weight"}


@dataclass(frozen=True)
class Converted:
    """A DiffuSeq checkpoint in this package's names."""

    model: ModelConfig
    diffusion: DiffusionConfig
    tensors: dict[str, Tensor]
    embedding_difference: float


def convert(
    state: Mapping[str, Tensor], args: Mapping[str, Any], where: StrPath, embedding: str = "raw"
) -> Converted:
    """Rename and fuse DiffuSeq's tensors into this package's, after checking every one.

    DiffuSeq ties lm_head to word_embedding, but its EMA files hold two different matrices:
    word_embedding.weight is averaged, lm_head.weight is the raw one, and the official sampler ends
    up with the raw one in both roles. embedding="raw" does the same; "ema" uses the average. A
    warning tells when they differ.

    Args:
        state: DiffuSeq's state dict, e.g. 211 entries at 12 layers.
        args: the content of training_args.json.
        where: the file, for messages.

    Raises:
        ModelFileError: missing, unexpected, misshapen or non-finite tensors, or sizes that
            contradict training_args.json.
    """
    if "mean_embed" in state:
        raise ModelFileError(
            f"{where}: is a DiffuSeq-v2 checkpoint (it has mean_embed); only the first version's "
            "models can be imported"
        )
    model = _model_config(state, args, where)
    check_tensors(
        original_shapes(model),
        {name: tensor for name, tensor in state.items() if name != "position_ids"},
        where,
        dtypes=(torch.float32,),
    )
    _check_positions(state["position_ids"], model.max_positions, where)
    difference = (state["lm_head.weight"] - state["word_embedding.weight"]).abs().max().item()
    if difference > 0:
        warnings.warn(
            f"{where}: its two embedding matrices differ by up to {difference:.3g} "
            "(lm_head.weight is raw, word_embedding.weight is EMA); using the "
            + ("raw one, as the official sampler does" if embedding == "raw" else "EMA one"),
            stacklevel=2,
        )
    tensors = {
        "tokens.weight": state[EMBEDDINGS[embedding]],
        "tokens.bias": state["lm_head.bias"],
        "backbone.position.weight": state["position_embeddings.weight"],
    }
    for kind in ("weight", "bias"):
        tensors |= {f"{our}.{kind}": state[f"{its}.{kind}"] for our, its in _TRUNK.items()}
        for i in range(model.num_layers):
            ours, layer = f"backbone.blocks.{i}", f"input_transformers.layer.{i}"
            tensors |= {
                f"{ours}.{o}.{kind}": state[f"{layer}.{n}.{kind}"] for o, n in _BLOCK.items()
            }
            tensors[f"{ours}.attention.qkv.{kind}"] = torch.cat(
                [state[f"{layer}.attention.self.{part}.{kind}"] for part in _QKV]
            )
    return Converted(model, _diffusion_config(args, where), tensors, difference)


def original_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes by DiffuSeq's names, without the buffer position_ids."""
    vocab, d, hidden = model.vocab_size, model.embedding_dim, model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "word_embedding.weight": (vocab, d),
        "lm_head.weight": (vocab, d),
        "lm_head.bias": (vocab,),
        "position_embeddings.weight": (model.max_positions, hidden),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)

    linear("time_embed.0", 4 * model.time_dim, model.time_dim)
    linear("time_embed.2", hidden, 4 * model.time_dim)
    linear("input_up_proj.0", hidden, d)
    linear("input_up_proj.2", hidden, hidden)
    linear("output_down_proj.0", hidden, hidden)
    linear("output_down_proj.2", d, hidden)
    norm("LayerNorm")
    for i in range(model.num_layers):
        layer = f"input_transformers.layer.{i}"
        for part in _QKV:
            linear(f"{layer}.attention.self.{part}", hidden, hidden)
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        linear(f"{layer}.intermediate.dense", model.ffn_size, hidden)
        linear(f"{layer}.output.dense", hidden, model.ffn_size)
        norm(f"{layer}.attention.output.LayerNorm")
        norm(f"{layer}.output.LayerNorm")
    return shapes


def _model_config(
    state: Mapping[str, Tensor], args: Mapping[str, Any], where: StrPath
) -> ModelConfig:
    """Read the sizes off the tensors; training_args.json may only agree."""
    layers = {int(match[1]) for name in state if (match := _LAYER.match(name))}
    sizes: dict[str, Any] = {"num_layers": max(layers, default=0) + 1}
    # Names first: a shape can only be read where there is a tensor. The sizes play no part.
    names = original_shapes(ModelConfig(**sizes)) if sizes["num_layers"] <= 128 else {}
    check_names([*names, "position_ids"], state, where)
    sources = {
        "vocab_size": ("lm_head.weight", 0),
        "embedding_dim": ("lm_head.weight", 1),
        "time_dim": ("time_embed.0.weight", 1),
        "max_positions": ("position_embeddings.weight", 0),
        "hidden_size": ("position_embeddings.weight", 1),
        "ffn_size": ("input_transformers.layer.0.intermediate.dense.weight", 0),
    }
    for key, (name, axis) in sources.items():
        if state[name].dim() != 2:
            raise ModelFileError(
                f"{where}: {name} must be a matrix, is {list(state[name].shape)}; {ONLY_V1}"
            )
        sizes[key] = state[name].shape[axis]
    # To a configuration a vocabulary of 0 means one that is not known yet.
    if sizes["vocab_size"] < 1:
        raise ModelFileError(
            f"{where}: lm_head.weight has no rows, is {list(state['lm_head.weight'].shape)}; "
            f"{ONLY_V1}"
        )
    bert = args.get("bert_config", {})
    claims = {
        "hidden_dim": (args.get("hidden_dim"), "embedding_dim"),
        "hidden_t_dim": (args.get("hidden_t_dim"), "time_dim"),
        "bert_config.hidden_size": (bert.get("hidden_size"), "hidden_size"),
        "bert_config.num_hidden_layers": (bert.get("num_hidden_layers"), "num_layers"),
        "bert_config.intermediate_size": (bert.get("intermediate_size"), "ffn_size"),
    }
    for key, (claimed, ours) in claims.items():
        if claimed is not None and claimed != sizes[ours]:
            raise ModelFileError(
                f"{where}: {ARGS_NAME} says {key} = {claimed!r:.40}, the tensors say "
                f"{sizes[ours]}; the two files are of different models"
            )
    heads = bert.get("num_attention_heads", sizes["hidden_size"] // 64)
    try:
        return ModelConfig(
            **sizes, seq_len=args["seq_len"], num_heads=heads, dropout=args.get("dropout", 0.1)
        )
    except ConfigError as reason:
        raise ModelFileError(
            f"{where}: with {ARGS_NAME}: {reason}; use the checkpoint's own {ARGS_NAME}"
        ) from reason


def _diffusion_config(args: Mapping[str, Any], where: StrPath) -> DiffusionConfig:
    try:
        return DiffusionConfig(
            schedule=args["noise_schedule"],
            num_timesteps=args["diffusion_steps"],
            rescale_timesteps=args.get("rescale_timesteps", True),
        )
    except ConfigError as reason:
        raise ModelFileError(
            f"{where}: with {ARGS_NAME}: {reason}; use the checkpoint's own {ARGS_NAME}"
        ) from reason


def _check_positions(position_ids: Tensor, count: int, where: StrPath) -> None:
    if not torch.equal(position_ids, torch.arange(count)[None]):
        raise ModelFileError(
            f"{where}: position_ids must be 0 … {count - 1} as [1, {count}] int64, is "
            f"{list(position_ids.shape)} {position_ids.dtype}; {ONLY_V1}"
        )
