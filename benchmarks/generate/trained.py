"""The check of lower precisions on a trained model, before they are timed.

A random network's outputs are nothing like a trained one's, so its agreement would prove nothing.
The model is the grammar task's student (`benchmarks/data/grammar-student`), its prompts that task's
test split, written anew from its seed.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from benchmarks.generate import targets as names
from benchmarks.generate.cases import Model
from benchmarks.generate.lineup import Lineup
from benchmarks.generate.ours import Own
from benchmarks.generate.peers import Peer, peers
from benchmarks.harness.records import ROOT
from dlmone_fast.data.rows import load_rows
from dlmone_fast.runtime import load_model
from dlmone_fast.tasks.grammar import write_splits

FOLDER = ROOT / "benchmarks" / "data" / "grammar-student"
PROMPTS = 256
_CALIBRATION_PROMPTS = 64

LEAST = {"bf16": 0.995, "fp16": 0.995, "int8": 0.98}
"""The share of tokens that must be fp32's, by precision."""


@functools.lru_cache(maxsize=1)
def trained_model(device: torch.device) -> Model:
    """The trained student on a device, in fp32 weights."""
    loaded = load_model(str(FOLDER), str(device), "fp32", backend="eager")
    return Model(
        loaded.denoiser, loaded.tokenizer, loaded.settings, loaded._executor.vocabulary,
        texts=functools.partial(_prompts, "test"), calibration=_calibration,
    )  # fmt: skip


class TrainedGate:
    """Agreement of every implementation with fp32 on the trained model, measured once each.

    Args:
        device: where they run.
        folder: for networks that peers export.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device = device
        self.folder = folder
        self._found: dict[str, float | None] = {}

    def agreement(self, contender: Own | Peer) -> float | None:
        """The share of tokens that are fp32's; None for fp32 itself, or where it cannot run."""
        if names.precision_of(contender.name) not in LEAST:
            return None
        if contender.name not in self._found:
            self._found[contender.name] = self._measured(contender)
        return self._found[contender.name]

    def complaint(self, contender: Own | Peer) -> str:
        """The reason not to time the implementation; "": there is none."""
        least = LEAST.get(names.precision_of(contender.name))
        if least is None:
            return ""
        found = self.agreement(contender)
        if found is None:
            return "wrong: it does not run the trained model that lower precisions are checked on"
        if found >= least:
            return ""
        return f"wrong: {found:.2%} of a trained model's tokens are fp32's, {least:.1%} must be"

    def _measured(self, contender: Own | Peer) -> float | None:
        model, found = trained_model(self.device), contender
        if isinstance(contender, Own):
            found = Own(model, contender.backend, contender.precision)
        else:
            same = [peer for peer in peers(model, self.folder) if peer.name == contender.name]
            if not same:
                return None
            found = same[0]
        lineup = Lineup(model, PROMPTS, gated=False)
        lineup.add(found, parts=False)
        agreement: float | None = lineup.fields[found.name].get("agreement")
        return agreement


def _calibration() -> list[str]:
    return _prompts("valid", _CALIBRATION_PROMPTS)


@functools.lru_cache(maxsize=4)
def _prompts(split: str, count: int) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        write_splits(name, "grammar", 0, 1, count, count)
        return [row.src for row in load_rows(name, split, limit=count)]
