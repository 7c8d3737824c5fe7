"""Lower precisions are timed only where a trained model's tokens stay what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.generate import ours as generate_ours
from benchmarks.generate import trained
from benchmarks.generate.lineup import Lineup
from benchmarks.generate.ours import Own
from benchmarks.generate.peers import Network, Peer
from benchmarks.generate.trained import TrainedGate, trained_model
from dlmone_fast.tasks.grammar import score

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def imitated_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow where the CPU has none, with the same results."""
    monkeypatch.setattr(generate_ours, "cpu_has_bf16", lambda: True)


@pytest.fixture
def gate(tmp_path: Path) -> TrainedGate:
    return TrainedGate(CPU, tmp_path)


def test_the_committed_student_is_a_trained_one():
    model = trained_model(CPU)
    prompts = model.texts(64)
    assert len(set(prompts)) == 64
    texts = Own(model, "eager", "fp32")(prompts).texts
    assert score(prompts, [[text] for text in texts])["joint"] > 0.9


def test_agreement_is_measured_for_lower_precisions_alone(gate: TrainedGate):
    model = trained_model(CPU)
    assert gate.agreement(Own(model, "eager", "fp32")) is None
    found = gate.agreement(Own(model, "eager", "bf16"))
    assert found is not None
    assert trained.LEAST["bf16"] <= found <= 1
    assert gate.complaint(Own(model, "eager", "bf16")) == ""


def test_what_disagrees_is_not_timed(gate: TrainedGate, monkeypatch: pytest.MonkeyPatch):
    own = Own(trained_model(CPU), "eager", "bf16")
    monkeypatch.setitem(trained.LEAST, "bf16", 1.5)
    lineup = Lineup(trained_model(CPU), 2, gate)
    assert not lineup.add(own)
    assert not lineup.calls
    assert lineup.fields[own.name]["note"].startswith("wrong: ")
    assert lineup.fields[own.name]["trained_agreement"] == gate.agreement(own)


def test_what_cannot_run_on_the_trained_model_is_not_timed_either(gate: TrainedGate):
    def fails() -> Network:
        raise RuntimeError("no such device")

    peer = Peer("other int8", fails)
    assert gate.agreement(peer) is None
    assert "does not run" in gate.complaint(peer)


def test_the_gate_asks_contenders_that_are_timed_at_some_batches_only(
    gate: TrainedGate, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Own, "batches", (1, 512))
    assert (gate.agreement(Own(trained_model(CPU), "eager", "bf16")) or 0) > 0.99
