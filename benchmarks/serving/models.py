"""Model folders to serve: a tiny one, for the server's own cost, and one of full size."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import torch

from benchmarks.generate import cases
from dlmone_fast.config import DiffusionConfig, ModelConfig, to_dict
from dlmone_fast.diffusion import Schedule
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.models.folder import save_folder
from dlmone_fast.networks import DiffusionLM
from dlmone_fast.runtime import GenerationSettings
from dlmone_fast.text_tokenizer import TextTokenizer
from dlmone_fast.tokenizer import Tokenizer

_WORDS = tuple(a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "ai"))
_SMALL = ModelConfig(
    seq_len=24, vocab_size=len(_WORDS) + 5, embedding_dim=16, time_dim=16, hidden_size=64,
    num_layers=2, num_heads=2, ffn_size=128, norm="pre", normalize_embedding=True,
)  # fmt: skip


def save_small(path: Path) -> list[str]:
    """A random network whose texts differ from prompt to prompt; returns the words it knows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = DiffusionLM(_SMALL)
    # Predictions as far out as embeddings are, so that each position has a choice of its own.
    last = lm.backbone.output_projection[-1]
    assert isinstance(last, torch.nn.Linear)
    last.weight.data *= 8
    denoiser = Denoiser(lm, Schedule(DiffusionConfig(num_timesteps=40)))
    settings = GenerationSettings(t_init=30, max_source_tokens=10, max_chars=200)
    _save(path, denoiser, Tokenizer.from_words(_WORDS), settings)
    return list(_WORDS)


def save_bert_base(path: Path) -> None:
    """A network of BERT-base's shape, as the other benchmarks time it."""
    made = cases.model(cases.BERT_BASE, torch.device("cpu"))
    _save(path, made.denoiser, made.tokenizer, made.settings)


def small_prompts(words: list[str], count: int) -> list[str]:
    """Sources of one to eight words."""
    numbers = random.Random(0)
    return [" ".join(numbers.choices(words, k=numbers.randint(1, 8))) for _ in range(count)]


def _save(
    path: Path, denoiser: Denoiser, tokenizer: TextTokenizer, settings: GenerationSettings
) -> None:
    generation = dataclasses.asdict(settings)
    del generation["kind"]
    save_folder(
        path,
        config={
            "kind": settings.kind,
            "model": to_dict(denoiser.config),
            "diffusion": to_dict(denoiser.schedule.config),
        },
        tensors=dict(denoiser.lm.state_dict()),
        tokenizer_json=tokenizer.to_json(),
        generation_config=generation,
    )
