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

REFINING_STEPS = 4
"""Calls of the few-step generation whose inputs are measured beside the model's own."""


@torch.inference_mode()
def network_inputs(
    denoiser: Denoiser, settings: GenerationSettings, rows: Rows
) -> tuple[Tensor, Tensor]:
    """x_t [n, L, d] and t [n] of a student's calls on these rows, at one and at a few steps.

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
    for steps in sorted({settings.steps, min(REFINING_STEPS, settings.t_init)}):
        pipeline = Pipeline(
            denoiser.schedule, vocabulary, settings.t_init, steps, settings.scale_latent
        )
        pipeline.embeddings(watched, rows.ids, rows.mask, rows.batch(steps).draws)
    return torch.cat([x for x, _ in seen]), torch.cat([t for _, t in seen])
