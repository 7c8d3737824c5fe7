"""Measuring a model while it trains: losses, scores of generated text, sample texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dlmone_fast.config import TeacherConfig
from dlmone_fast.data.batches import batches_in_order, training_batch
from dlmone_fast.data.rows import load_rows
from dlmone_fast.diffusion import Draw
from dlmone_fast.evaluation.scores import score_generations
from dlmone_fast.evaluation.seeds import row_seeds
from dlmone_fast.kernels.noise import Stream, uniform_integers
from dlmone_fast.losses.teacher import teacher_loss
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.runtime.generator import Generator
from dlmone_fast.runtime.options import GenerationSettings
from dlmone_fast.tasks import g2p, grammar
from dlmone_fast.training.progress import Progress
from dlmone_fast.training.workspace import Workspace

_LOSS_ROWS = 256
_SHOWN = 3
_DIVERSITY_ROWS = 64
_DIVERSITY_CANDIDATES = 4
_PRONUNCIATIONS = 5


class Validator:
    """Scores one-step generation on the validation split, always from the same noise."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.config = workspace.config
        self.rows = load_rows(
            workspace.data_dir, "valid", limit=self.config.distill.validation_rows
        )
        self._sources = [row.src for row in self.rows]

    def generator(self, denoiser: Denoiser, kind: str) -> Generator:
        """The networks as they will be used, with the run's settings."""
        settings = generation_settings(self.config, kind)
        return Generator(denoiser, self.workspace.tokenizer, settings)

    def scores(self, denoiser: Denoiser) -> dict[str, float]:
        """Scores of a student, with the collapse diagnostics, and the grammar's exact ones.

        Of pronunciations: `wer`, `per`, `oracle_wer`, `word_accuracy` and `distinct`, alone.
        """
        generator = self.generator(denoiser, "student")
        if self.config.data.task == g2p.TASK:
            spoken = self._generated(generator, self._sources, _PRONUNCIATIONS)
            found = g2p.score([row.references for row in self.rows], spoken)
            return {name: value for name, value in found.items() if isinstance(value, float)}
        several = self.config.is_grammar
        n = _DIVERSITY_CANDIDATES if several else 1
        texts = self._generated(generator, self._sources, n)
        scores = self._text_scores(generator, texts)
        if several:
            exact = grammar.score(self._sources, texts)
            scores.update({k: v for k, v in exact.items() if isinstance(v, float)})
            scores["balanced"] = 0.5 * (scores["joint"] + scores["both_registers"])
        return scores

    def show_samples(self, denoiser: Denoiser, kind: str, step: int, progress: Progress) -> None:
        """Record and print a few generated texts."""
        if not self.workspace.ranks.writes:
            return
        generator = self.generator(denoiser, kind)
        sources = self._sources[:_SHOWN]
        texts = generator.generate(sources, on_overflow="truncate", progress=False)
        progress.record(
            step, {"samples": [list(pair) for pair in zip(sources, texts, strict=True)]}
        )
        for source, text in zip(sources, texts, strict=True):
            progress.say(f"  {source}\n    → {text}")

    def _generated(self, generator: Generator, sources: list[str], count: int) -> list[list[str]]:
        """`count` texts of each source; each rank makes those of a part of the sources."""
        ranks, seeds = self.workspace.ranks, row_seeds(self.config.seed, len(sources))
        part = ranks.part(len(sources))
        texts = generator.generate_candidates(
            sources[part], num_candidates=count, seeds=seeds[part],
            on_overflow="truncate", progress=False,
        ).texts  # fmt: skip
        return [of_source for of_rank in ranks.gather(texts) for of_source in of_rank]

    def _text_scores(self, generator: Generator, texts: list[list[str]]) -> dict[str, float]:
        normal_text = generator.normalize_text
        sources = [normal_text(row.src) for row in self.rows]
        references = [[normal_text(text) for text in row.references] for row in self.rows]
        first = [candidates[0] for candidates in texts]
        scores = score_generations(sources, references, [first], bootstrap=0)
        few = self._sources[:_DIVERSITY_ROWS]
        diverse = (
            texts[: len(few)]
            if len(texts[0]) > 1
            else self._generated(generator, few, _DIVERSITY_CANDIDATES)
        )
        spread = score_generations(
            sources[: len(few)],
            references[: len(few)],
            [list(column) for column in zip(*diverse, strict=True)],
            bootstrap=0,
        )
        kept = (
            "bleu", "ibleu", "rouge_l", "empty", "length_ratio", "repeat", "exact_copy", "unknown"
        )  # fmt: skip
        return {
            **{name: float(scores[name]) for name in kept},
            "self_bleu": float(spread["self_bleu"]),
            "div_4": float(spread["div_4"]),
        }


def generation_settings(config: Any, kind: str) -> GenerationSettings:
    """How a model of this run generates."""
    limits: Mapping[str, Any] = {
        "max_source_tokens": config.max_source_tokens,
        "max_chars": config.data.max_chars,
    }
    if kind == "teacher":
        return GenerationSettings(kind="teacher", sampler="ddim", steps=20, **limits)
    distill = config.distill
    return GenerationSettings(
        t_init=distill.t_init,
        scale_latent=distill.scale_latent,
        temperature=distill.temperature,
        **limits,
    )


@torch.no_grad()
def validation_loss(
    workspace: Workspace, denoiser: Denoiser, config: TeacherConfig
) -> dict[str, float]:
    """Mean loss terms of a teacher on the first rows of the validation split."""
    cache, ranks = workspace.cache("valid"), workspace.ranks
    seed, device = workspace.config.seed, workspace.device
    sums: dict[str, float] = {}
    count = min(len(cache), _LOSS_ROWS)
    batches = list(batches_in_order(count, config.micro_batch_size))
    for rows in batches[ranks.part(len(batches))]:
        sizes = denoiser.config
        ids, mask = training_batch(cache, rows, sizes, workspace.tokenizer)
        slots = torch.from_numpy(rows)
        draw = (seed, Stream.EVALUATION, slots)
        t = uniform_integers(*draw, 0, 0, denoiser.schedule.num_timesteps).to(device)
        noise, start = Draw(*draw, 1), Draw(*draw, 2)
        ids, mask = ids.to(device), mask.to(device)
        terms = teacher_loss(
            denoiser.lm, denoiser.schedule, config, ids.long(), mask, t, noise, start,
            workspace.tokenizer.pad_id,
        )  # fmt: skip
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value.sum())
    total: dict[str, float] = {}
    # A rank may have had no batch.
    for of_rank in ranks.gather(sums):
        total = {name: total.get(name, 0.0) + value for name, value in of_rank.items()} or total
    return {name: value / count for name, value in total.items()}
