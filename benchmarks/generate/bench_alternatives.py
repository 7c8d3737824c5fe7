"""One step of a diffusion LM beside autoregressive models that write 20 tokens, text to text.

Both sides have layers of the same sizes and random weights, on which time does not depend; what
either writes says nothing about quality. The end of the text is never chosen, so that 20 tokens
are written always: about as many as a paraphrase of a question has. One step writes all positions
of its network at once.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.generate import cases
from benchmarks.generate.alternatives import Setting, comparable, line_up
from benchmarks.generate.cases import BERT_BASE, COMPACT, Case
from benchmarks.generate.lineup import Lineup
from benchmarks.generate.ours import owns
from benchmarks.generate.trained import TrainedGate
from benchmarks.harness.race import Race

OPERATION = "generate beside autoregressive models"

_ONE = [Case("BERT-base", BERT_BASE, 1), Case("compact", COMPACT, 1)]
CASES = {
    "cpu": _ONE,
    "cuda": [*_ONE, Case("BERT-base", BERT_BASE, 32), Case("BERT-base", BERT_BASE, 128)],
}
# The fastest backends, and what anyone has.
_OURS = {
    "cpu": {("openvino", "fp32"), ("openvino", "int8"), ("eager", "fp32")},
    "cuda": {("graph", "bf16"), ("graph", "fp32"), ("eager", "fp32")},
}
_SECONDS_EACH = 0.6


@pytest.mark.shapes(CASES)
def test_alternatives(
    whole: Race, shape: Case, device: torch.device, full: bool, gate: TrainedGate
) -> None:
    """Whole calls: ours in one step, then the others in twenty."""
    model = cases.model(shape.config, device)
    lineup = Lineup(model, shape.batch, gate)
    for own in owns(model):
        if (own.backend, own.precision) in _OURS[device.type]:
            lineup.add(own, parts=False)
    with tempfile.TemporaryDirectory() as folder:
        calls, fields = line_up(Setting(model, Path(folder)), shape.batch, full)
        timed = replace(
            whole,
            seconds_each=_SECONDS_EACH,
            report=lambda rows: whole.report([comparable(row, device) for row in rows]),
        )
        work = cases.work(shape, "fp32" if device.type == "cpu" else "bf16")
        implementations = {**lineup.calls, **calls}
        known = {**lineup.fields, **fields}
        timed(OPERATION, shape, implementations, None, work, fields=known)
