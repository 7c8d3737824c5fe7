"""Ids to ids: the fused path against the sampler's definition."""

from __future__ import annotations

import pytest
import tiny
import torch

from dlmone_fast.kernels.nearest_token import Vocabulary, nearest_token
from dlmone_fast.kernels.noise import Stream, normal
from dlmone_fast.runtime.pipeline import Pipeline, first_target
from dlmone_fast.runtime.rows import Rows
from dlmone_fast.samplers.one_step import generate_embeddings

SEEDS, CANDIDATES = [3, (1 << 64) - 1, 3, 0, 7], [0, 1, 2, 0, 63]


def some_rows() -> Rows:
    numbers = torch.Generator().manual_seed(0)
    vocabulary = tiny.tokenizer().vocab_size
    ids = torch.randint(0, vocabulary, (len(SEEDS), tiny.SEQ_LEN), generator=numbers)
    sources = torch.tensor([1, 5, 8, 0, tiny.SEQ_LEN]).unsqueeze(1)
    mask = (torch.arange(tiny.SEQ_LEN) >= sources).long()
    return Rows(ids, mask, SEEDS, CANDIDATES)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("scale_latent", [True, False])
def test_the_pipeline_is_the_sampler_and_rounding(steps: int, scale_latent: bool):
    denoiser, rows = tiny.denoiser(), some_rows()
    vocabulary = Vocabulary(denoiser.embedding)
    pipeline = Pipeline(denoiser.schedule, vocabulary, 30, steps, scale_latent)
    with torch.inference_mode():
        ids, margins = pipeline.run(denoiser, rows.batch(steps))
        x0 = generate_embeddings(
            denoiser,
            denoiser.schedule,
            30,
            steps,
            denoiser.embedding[rows.ids],
            rows.mask,
            lambda step: normal(SEEDS, Stream.GENERATION, CANDIDATES, step, tiny.SEQ_LEN, 16),
            scale_latent,
        )
    expected = torch.where(rows.mask != 0, nearest_token(x0, denoiser.embedding), rows.ids)
    assert torch.equal(ids, expected)
    assert margins.isinf().tolist() == [False, False, False, False, True]
    assert (margins[:4] > 0).all()


def test_a_row_alone_needs_no_margin():
    denoiser, rows = tiny.denoiser(), some_rows()
    pipeline = Pipeline(denoiser.schedule, Vocabulary(denoiser.embedding), 30, 1, True)
    with torch.inference_mode():
        together, _ = pipeline.run(denoiser, rows.batch(1))
        alone, margins = pipeline.run(denoiser, rows.part(1, 2).batch(1))
    assert torch.equal(alone, together[1:2])
    assert margins.isinf().all()


def test_what_a_target_position_holds_is_not_read():
    denoiser, rows = tiny.denoiser(), some_rows()
    pipeline = Pipeline(denoiser.schedule, Vocabulary(denoiser.embedding), 30, 2, True)
    other = torch.where(rows.mask != 0, (rows.ids + 1) % 7, rows.ids)
    with torch.inference_mode():
        first, _ = pipeline.run(denoiser, rows.batch(2))
        second, _ = pipeline.run(denoiser, Rows(other, rows.mask, SEEDS, CANDIDATES).batch(2))
    assert torch.equal(first, second)


def test_the_last_call_is_asked_for_the_targets_alone():
    denoiser, rows = tiny.denoiser(), some_rows().part(0, 3)
    pipeline = Pipeline(denoiser.schedule, Vocabulary(denoiser.embedding), 30, 2, True)
    asked: list[int] = []

    def predict_from(x_t: torch.Tensor, t: torch.Tensor, first: int) -> torch.Tensor:
        asked.append(first)
        return denoiser(x_t, t)[:, first:]

    with torch.inference_mode():
        whole, margins = pipeline.run(denoiser, rows.batch(2))
        ids, same_margins = pipeline.run(denoiser, rows.batch(2), predict_from)
        alone, _ = pipeline.run(denoiser, rows.part(1, 2).batch(2), predict_from)
    assert asked == [1, 5]
    assert torch.equal(ids, whole)
    assert torch.equal(margins, same_margins)
    assert torch.equal(alone, whole[1:2])


@pytest.mark.parametrize(
    ("mask", "first"),
    [([[0, 0, 1], [0, 0, 1]], 2), ([[0, 0, 1], [0, 1, 0]], 1), ([[1, 0, 0]], 0), ([[0, 0, 0]], 2)],
)
def test_the_first_target_of_a_batch(mask: list[list[int]], first: int):
    assert first_target(torch.tensor(mask)) == first
