"""Several candidates of one prompt and the choice of one, by this package and in plain code.

A choice by minimum Bayes risk keeps the candidate with the largest summed BLEU against the others.
The plain way is a batch of copies of the prompt and sacreBLEU for every ordered pair; this package
scores as DiffuSeq does, with another smoothing. Candidates of a random network are nearly equal,
which makes neither way of scoring faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from benchmarks.generate.cases import Model
from benchmarks.generate.ours import Own
from benchmarks.generate.peers import Peer, PlainCall
from benchmarks.harness.timing import Call
from dlmone_fast.kernels.noise import Stream, draws_of, normal_of_draws
from dlmone_fast.runtime import GenerationOutput

# Of a lower precision's candidates, the share that must be those of fp32 on the same noise.
_LEAST_EQUAL = 0.5
# BLEUs with other smoothing may prefer another one of nearly equals.
_SLACK = 0.01


def candidate_calls(own: Own, plain: Peer, count: int) -> tuple[Call, Call]:
    """Ours and the plain call for `count` candidates of one prompt, after a comparison."""
    call, prompt = PlainCall(own.model, plain), own.model.texts(1)
    expected = call(prompt * count, _noise(own.model, count)).texts
    wrong = complaint(own, _ours(own, prompt, count), expected)
    if wrong:
        pytest.fail(f"{own.name}, {count} candidates: {wrong}")

    def plainly() -> str:
        texts = call(prompt * count).texts
        scores = summed_bleu(texts)
        return texts[scores.index(max(scores))]

    return (lambda: _ours(own, prompt, count).texts), plainly


def complaint(own: Own, found: GenerationOutput, expected: Sequence[str]) -> str:
    """The fault of our candidates or of the one kept; "": there is none."""
    candidates, kept = found.candidates[0], found.texts[0]
    if len(candidates) != len(expected):
        return f"{len(candidates)} candidates came"
    equal = sum(a == b for a, b in zip(candidates, expected, strict=True)) / len(expected)
    if equal < (1.0 if own.precision == "fp32" else _LEAST_EQUAL):
        return f"{equal:.0%} of the candidates are those of fp32"
    if kept not in candidates:
        return "the answer is none of the candidates"
    scores = summed_bleu(candidates)
    score = scores[candidates.index(kept)]
    if score < (1 - _SLACK) * max(scores):
        return f"the answer's summed BLEU is {score:.1f}, another one's is {max(scores):.1f}"
    return ""


def summed_bleu(texts: Sequence[str]) -> list[float]:
    """sacreBLEU's sentence BLEU of each text against each other one, added up."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    return [
        sum(bleu.sentence_score(text, [other]).score for j, other in enumerate(texts) if j != i)
        for i, text in enumerate(texts)
    ]


def _ours(own: Own, prompt: list[str], count: int) -> GenerationOutput:
    return own.generator.generate(
        prompt, num_candidates=count, select="mbr", on_overflow="truncate", return_dict=True
    )


def _noise(model: Model, count: int) -> torch.Tensor:
    """The normals of candidates 0, 1, … of a prompt whose seed is 0."""
    config, cpu = model.denoiser.config, torch.device("cpu")
    draws = draws_of([0] * count, list(range(count)), 0, cpu).to(model.device)
    return normal_of_draws(draws, Stream.GENERATION, config.seq_len, config.embedding_dim)
