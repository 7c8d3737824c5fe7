"""A BERT-family folder of two layers of width 16, and BERT's layer as it is published."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from dlmone_fast.tokenizer import SPECIAL_TOKENS

_WORDS = "how does the cat work what makes go ? ##ing tree river old dog engine summer ж ##ж 漢"
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PIECES = [
    *SPECIAL_TOKENS,
    *_WORDS.split(),
    *(prefix + char for char in _CHARACTERS for prefix in ("", "##")),
]
CONFIG = {
    "model_type": "bert", "hidden_act": "gelu", "hidden_size": 16, "num_attention_heads": 2,
    "num_hidden_layers": 2, "intermediate_size": 24, "max_position_embeddings": 48,
    "type_vocab_size": 2, "vocab_size": len(PIECES),
}  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h, f = 16, 24
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(PIECES), h),
        "embeddings.position_embeddings.weight": (48, h),
        "embeddings.token_type_embeddings.weight": (2, h),
        "embeddings.LayerNorm.weight": (h,),
        "embeddings.LayerNorm.bias": (h,),
        "pooler.dense.weight": (h, h),
    }
    for i in range(2):
        layer = f"encoder.layer.{i}."
        for name, shape in (
            *((f"attention.self.{n}", (h, h)) for n in ("query", "key", "value")),
            ("attention.output.dense", (h, h)),
            ("intermediate.dense", (f, h)),
            ("output.dense", (h, f)),
        ):
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        for name in ("attention.output", "output"):
            shapes |= {f"{layer}{name}.LayerNorm.{kind}": (h,) for kind in ("weight", "bias")}
    return {
        f"bert.{name}": torch.randn(shape, generator=generator) * 0.3
        for name, shape in shapes.items()
    }


def write_bert(folder: Path) -> Path:
    """Write the folder: config.json, vocab.txt, model.safetensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    save_file(tensors(), folder / "model.safetensors")
    return folder


def bert_layer(x: torch.Tensor, weights: dict[str, torch.Tensor], index: int) -> torch.Tensor:
    """BERT's layer as it is published: post-norm, two heads of eight."""
    w = {k.removeprefix(f"bert.encoder.layer.{index}."): v for k, v in weights.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / x.var(-1, correction=0, keepdim=True).sqrt()
        return scaled * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    parts = []
    q, k, v = (linear(f"attention.self.{n}", x) for n in ("query", "key", "value"))
    for head in (slice(0, 8), slice(8, 16)):
        p = (q[:, head] @ k[:, head].T / 8**0.5).softmax(-1)
        parts.append(p @ v[:, head])
    x = norm("attention.output", x + linear("attention.output.dense", torch.cat(parts, -1)))
    inner = torch.nn.functional.gelu(linear("intermediate.dense", x))
    return norm("output", x + linear("output.dense", inner))
