"""8-bit scales are measured on what the network sees, at one call and at a few."""

from __future__ import annotations

import pytest
import tiny
import torch

from dlmone_fast.errors import UsageError
from dlmone_fast.runtime.calibration import (
    PROMPTS,
    REFINED_PROMPTS,
    REFINING_STEPS,
    network_inputs,
)


def test_inputs_are_those_of_one_and_of_a_few_calls():
    generator = tiny.generator()
    rows = generator._encoded(tiny.prompts(PROMPTS + 20))
    x_t, t = network_inputs(generator.denoiser, generator.settings, rows)
    assert x_t.shape == (PROMPTS + REFINED_PROMPTS * REFINING_STEPS, tiny.SEQ_LEN, 16)
    assert t[:PROMPTS].unique().tolist() == [30]
    assert t[PROMPTS:].unique().tolist() == [7, 15, 22, 30]
    seen: list[torch.Tensor] = []
    runner = generator._executor.pool.engine.runner()

    def watched(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return runner.predict(x, t)

    batch = rows.part(0, PROMPTS).batch(1)
    with torch.inference_mode():
        generator._executor.pipeline(generator.settings).embeddings(
            watched, batch.ids, batch.mask, batch.draws
        )
    assert torch.equal(x_t[:PROMPTS], seen[0])


def test_teachers_and_no_prompts_are_refused():
    teacher, student = tiny.generator("teacher"), tiny.generator()
    for generator, prompts in ((teacher, ["ba"]), (student, [])):
        rows = generator._encoded(prompts)
        with pytest.raises(UsageError, match="calibration must be prompts for a student"):
            network_inputs(generator.denoiser, generator.settings, rows)
