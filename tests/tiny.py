"""Tiny random models, for tests of everything around a network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from dlmone_fast.config import DiffusionConfig, ModelConfig, to_dict
from dlmone_fast.diffusion import Schedule
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.models.folder import save_folder
from dlmone_fast.networks import DiffusionLM
from dlmone_fast.runtime import GenerationSettings, Generator
from dlmone_fast.runtime.rows import RowBatch, Rows
from dlmone_fast.tokenizer import Tokenizer

WORDS = tuple(f"{a}{b}" for a in "bcdfghklmn" for b in ("a", "e", "i", "o", "u", "ai"))
SEQ_LEN = 20
MAX_SOURCE_TOKENS = 8


def tokenizer() -> Tokenizer:
    """Word-level, 60 words."""
    return Tokenizer.from_words(WORDS)


def denoiser(seed: int = 0, **sizes: Any) -> Denoiser:
    """A random network, a function of the seed."""
    model = ModelConfig(
        **{
            "seq_len": SEQ_LEN, "vocab_size": tokenizer().vocab_size, "embedding_dim": 16,
            "time_dim": 16, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64,
            "norm": "pre", "normalize_embedding": True, **sizes,
        }
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = DiffusionLM(model)
    # Predictions as far out as embeddings, as a trained network's are: near ties stay rare.
    lm.backbone.output_projection[-1].weight.data *= 8
    return Denoiser(lm, Schedule(DiffusionConfig(num_timesteps=40))).eval().requires_grad_(False)


def settings(kind: str = "student", **changes: Any) -> GenerationSettings:
    """Settings that fit `denoiser`."""
    sampler = {"sampler": "ddim", "steps": 3} if kind == "teacher" else {}
    values = {"t_init": 30, "max_source_tokens": MAX_SOURCE_TOKENS, "max_chars": 200}
    return GenerationSettings(kind=kind, **{**values, **sampler, **changes})


def generator(kind: str = "student", seed: int = 0, **options: Any) -> Generator:
    """A generator in memory."""
    return Generator(denoiser(seed), tokenizer(), settings(kind), **options)


def save(path: Path, kind: str = "student", seed: int = 0, with_tokenizer: bool = True) -> Path:
    """Write a model folder."""
    network = denoiser(seed)
    generation = dataclasses.asdict(settings(kind))
    del generation["kind"]
    return save_folder(
        path,
        config={
            "kind": kind,
            "model": to_dict(network.config),
            "diffusion": to_dict(network.schedule.config),
        },
        tensors=dict(network.lm.state_dict()),
        tokenizer_json=tokenizer().to_json() if with_tokenizer else None,
        generation_config=generation,
    )


def prompts(count: int, seed: int = 0) -> list[str]:
    """Different sources of one to six words."""
    numbers = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (count,), generator=numbers).tolist()
    words = torch.randint(0, len(WORDS), (count, 6), generator=numbers).tolist()
    return [" ".join(WORDS[i] for i in row[:n]) for row, n in zip(words, lengths, strict=True)]


def row_batch(rows: int, steps: int = 1, seed: int = 0) -> RowBatch:
    """Random rows of a network batch, a function of the seed."""
    numbers = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (rows, SEQ_LEN), generator=numbers)
    sources = torch.randint(1, 9, (rows, 1), generator=numbers)
    mask = (torch.arange(SEQ_LEN) >= sources).long()
    seeds = torch.randint(0, 1 << 40, (rows,), generator=numbers).tolist()
    return Rows(ids, mask, seeds, [0] * rows).batch(steps)
