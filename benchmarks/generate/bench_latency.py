"""Seconds per sample at the numbers of network calls of DLM-One's Table 2, batch 1.

By default runs of each number are repeated for a few seconds, one at least; --full takes longer
and adds a whole run of all steps at BERT-base's size on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.generate import cases
from benchmarks.generate import latency as study
from benchmarks.generate.latency import PUBLISHED, Published, Sampler, Study
from benchmarks.generate.lineup import Lineup
from benchmarks.generate.ours import Own, owns
from benchmarks.generate.trained import TrainedGate
from benchmarks.harness.floors import Work
from benchmarks.harness.race import Race
from benchmarks.harness.records import Row

_SECONDS, _SECONDS_FULL = 5.0, 20.0
_RUNS = 100
_FEWEST_DERIVED_FROM = 3

Rows = dict[str, dict[str, Row]]


@pytest.fixture(scope="session")
def known() -> Rows:
    """Rows so far, by case and implementation."""
    return {}


@pytest.mark.shapes(study.CASES)
def test_latency(
    whole: Race,
    shape: Study,
    device: torch.device,
    full: bool,
    known: Rows,
    gate: TrainedGate,
    report_rows: Callable[[list[Row]], None],
) -> None:
    """The published formulation, our sampler, and at one step every backend of the student."""
    if shape.full and not full:
        pytest.skip(f"{shape} takes minutes: with --full; the report derives it from fewer steps")
    model, rows = cases.model(shape.config, device), known.setdefault(shape.case, {})
    wrong = study.disagreement(model)
    assert wrong is None, wrong
    systems, calls, fields = _systems(model, shape.steps, gate)
    # Other numbers of calls are derived from this one, so it takes more samples.
    fewest = _FEWEST_DERIVED_FROM if shape.derive and not shape.full else 1
    runs = replace(
        whole, seconds_each=_SECONDS_FULL if full else _SECONDS,
        fewest_rounds=fewest, fewest_samples=fewest, most_rounds=_RUNS, memory=False,
    )  # fmt: skip
    network = cases.work(cases.Case(shape.model, shape.config, 1), "fp32")
    work = Work(network.bytes, shape.steps * network.flops)
    expected = study.expected_seconds(rows, systems, shape.steps) if shape.steps > 1 else {}
    found = runs(study.OPERATION, shape.case, calls, None, work, fields=fields, expected=expected)
    rows.update({row.implementation: row for row in found})
    # With --full all steps are measured, and what lies between follows from them.
    for steps in shape.derive if shape.full == full else ():
        report_rows([_derived(rows, name, system, steps) for name, system in systems.items()])


def _systems(
    model: cases.Model, steps: int, gate: TrainedGate
) -> tuple[dict[str, str], dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    """Systems, calls and fields of the rows, by the implementation's name; ours first."""
    sampler, published, prompt = Sampler(model), Published(model), cases.prompts(1)[0]
    generator = sampler.generator()
    calls: dict[str, Callable[[], Any]] = {}
    fields: dict[str, dict[str, Any]] = {}
    if steps == 1:
        lineup = Lineup(model, 1, gate)
        for own in owns(model):
            _add_one_step(lineup, own, calls, fields)
    systems = {study.named(s, steps): s for s in (sampler.name, PUBLISHED)}
    first, second = systems
    calls |= {first: partial(sampler, generator, prompt, steps)}
    calls |= {second: partial(published, prompt, steps)}
    fields |= {name: {"at": steps, "dtype": "fp32"} for name in systems}
    return systems, calls, fields


def _add_one_step(
    lineup: Lineup, own: Own, calls: dict[str, Callable[[], Any]], fields: dict[str, dict[str, Any]]
) -> None:
    name = study.named(own.name, 1)
    if own.backend == "compile":
        # Compiling takes longer than all that is measured here.
        fields[name] = {"note": "absent: timed beside other libraries", "at": 1}
        return
    added = lineup.add(own, parts=False)
    fields[name] = {**lineup.fields[own.name], "at": 1}
    if added:
        calls[name] = lineup.calls[own.name]


def _derived(rows: dict[str, Row], name: str, system: str, steps: int) -> Row:
    return study.derived(rows[name], rows.get(study.named(system, 1)), steps, system)
