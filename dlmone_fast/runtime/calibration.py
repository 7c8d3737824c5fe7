"""What the network sees on real prompts: the inputs that 8-bit scales are measured on."""

from __future__ import annotations

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels.nearest_token import Vocabulary
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.runtime.options import GenerationSettings
from dlmone_fast.runtime.pipeline import Pipeline
from dlmone_fast.runtime.rows import Rows

PROMPTS = 32
"""Prompts whose inputs at the model's own number of calls are measured, at most."""
REFINED_PROMPTS, REFINING_STEPS = 8, 4
"""Prompts and calls of the few-step generation that is measured beside it.

Measured on a trained student (4 layers of width 128): 32, 64, 100 and 300 inputs agree with fp32 on
99.93 % of the target tokens each."""


@torch.inference_mode()
def network_inputs(
    denoiser: Denoiser, settings: GenerationSettings, rows: Rows
) -> tuple[Tensor, Tensor]:
    """x_t [n, L, d] and t [n] of a student's calls on these rows, at its own and at a few steps.

    The first `PROMPTS` rows are used.

    Raises:
        UsageError: the model is a teacher, or there is no row.
    """
    if settings.kind != "student" or not len(rows):
        raise UsageError("calibration must be prompts for a student; a teacher has no int8")
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append((x_t, t))
        x0: Tensor = denoiser(x_t, t)
        return x0

    vocabulary = Vocabulary(denoiser.embedding.detach())
    for count, steps in ((PROMPTS, settings.steps), (REFINED_PROMPTS, REFINING_STEPS)):
        steps = min(steps, settings.t_init)
        pipeline = Pipeline(
            denoiser.schedule, vocabulary, settings.t_init, steps, settings.scale_latent,
            settings.temperature, denoiser.lm.tokens.lookup(),
        )  # fmt: skip
        batch = rows.part(0, count).batch(steps)
        pipeline.embeddings(watched, batch.ids, batch.mask, batch.draws)
    return torch.cat([x for x, _ in seen]), torch.cat([t for _, t in seen])
