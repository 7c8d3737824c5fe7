"""The latency study: its samplers agree, and what is derived follows from what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.generate import latency as study
from benchmarks.generate.cases import Model
from benchmarks.generate.latency import PUBLISHED, Published, Sampler
from benchmarks.harness import targets
from benchmarks.harness.records import Row
from benchmarks.report import latency as latency_tables
from dlmone_fast.kernels.noise import Stream, normal

CASE = "tiny, batch 1"


def test_our_sampler_gives_the_published_ones_ids_on_the_same_noise(tiny: Model):
    assert study.disagreement(tiny) is None


def test_another_sampler_would_be_noticed(tiny: Model, monkeypatch: pytest.MonkeyPatch):
    # Another object: the answer about a model is kept.
    negated = replace(tiny, vocabulary=tiny.vocabulary)
    monkeypatch.setattr(Published, "rounded", lambda self, x: -x)
    assert "rounded to others" in (study.disagreement(negated) or "")
    # The checked samples stay near their noise: other noise is what would show.
    monkeypatch.setattr(study, "normal", lambda *args, **kwargs: -normal(*args, **kwargs))
    again = replace(tiny, vocabulary=tiny.vocabulary)
    assert "ids differ" in (study.disagreement(again) or "")


def test_the_full_chain_is_ancestral_and_runs_whole(tiny: Model):
    assert study.method_of(2000, 2000) == "ancestral"
    assert study.method_of(65, 2000) == "published-ddim"
    draws = [0]

    config = tiny.denoiser.config

    def noise(step: int) -> torch.Tensor:
        draws[0] += 1
        return normal([0], Stream.GENERATION, [0], step, config.seq_len, config.embedding_dim)

    expected = Published(tiny)("how do i find a house?", 2000, noise)
    assert draws[0] == 2001
    ours = Sampler(tiny)
    found = ours(ours.generator(), "how do i find a house?", 2000)
    assert sum(a == b for a, b in zip(found, expected, strict=True)) / len(found) > 0.9


def row(system: str, steps: int, mean: float | None, **more: object) -> Row:
    fields = {"median_ms": mean, "mean_ms": mean, "at": steps, **more}
    return Row(study.OPERATION, CASE, study.named(system, steps), "dlmone" in system, **fields)  # type: ignore[arg-type]


def test_more_steps_follow_from_the_cost_of_one():
    one, few = row(PUBLISHED, 1, 30.0), row(PUBLISHED, 65, 670.0, samples=3, p99_ms=700.0)
    assert study.cost_per_step(few, one) == 10.0
    found = study.derived(few, one, 2000, PUBLISHED)
    assert (found.implementation, found.at) == (f"{PUBLISHED}, 2000 steps", 2000)
    assert found.mean_ms == pytest.approx(30 + 1999 * 10)
    assert (found.samples, found.p99_ms) == (0, None)
    assert found.derived == "from 3 of 65 steps: 10 ms a step"
    assert study.derived(few, None, 130, PUBLISHED).mean_ms == pytest.approx(2 * 670)


def test_runs_to_come_are_foreseen_from_the_longest_so_far():
    known = {r.implementation: r for r in (row(PUBLISHED, 1, 30.0), row(PUBLISHED, 65, 650.0))}
    name = study.named(PUBLISHED, 650)
    assert study.expected_seconds(known, {name: PUBLISHED}, 650) == {name: pytest.approx(6.5)}
    assert study.expected_seconds(known, {"other, 650 steps": "other"}, 650) == {}


def table_rows() -> list[Row]:
    sampler = "dlmone_fast sampler eager fp32"
    return [
        row("dlmone_fast openvino fp32", 1, 8.0, samples=100, dtype="fp32"),
        row("dlmone_fast openvino int8", 1, 2.0, samples=100, trained_agreement=0.998),
        row("dlmone_fast openvino bf16", 1, None, note="absent: no bf16 on this CPU"),
        row("dlmone_fast eager fp32", 1, 10.0, samples=100),
        row(sampler, 1, 12.0, samples=100),
        row(PUBLISHED, 1, 20.0, samples=100),
        row(sampler, 2000, 20_000.0, samples=1),
        row(PUBLISHED, 2000, 40_000.0, derived="65 steps measured, 20 ms for each more"),
    ]


def test_the_factors_of_the_speed_up_multiply_to_the_whole():
    lines = latency_tables.decomposition(table_rows(), CASE).splitlines()[3:]
    assert "40,000.0 (derived)" in latency_tables.decomposition(table_rows(), CASE)
    factors = [float(line.split("|")[4].strip(" ×").replace(",", "")) for line in lines]
    assert factors == [2.0, 2000.0, 1.25, 4.0, 20_000.0]
    assert factors[0] * factors[1] * factors[2] * factors[3] == factors[4]


def test_the_table_stands_beside_the_papers_and_marks_what_was_derived():
    text = latency_tables.latency(table_rows(), CASE)
    last = next(line for line in text.splitlines() if line.strip("| ").startswith("2000"))
    assert "14.94" in last
    assert "498×" in last
    assert "40 (derived)" in last
    assert "20,000×" in last
    assert "absent: no bf16 on this CPU" in text
    assert latency_tables.decomposition(table_rows()[:4], CASE) == ""


def test_the_target_is_the_papers_ratio_over_the_published_sampler():
    found = [replace(r, case="BERT-base, batch 1") for r in table_rows()]
    judged = targets.judge(found, "cpu", 1e9, study.TARGETS)
    expected = [("met (derived)", pytest.approx(10 / 40_000))]
    assert [(t["outcome"], t["value"]) for t in judged] == expected
