"""Training steps of teacher, score estimator and generator beside plain PyTorch.

By default on a CPU: the compact model at batch 8, the teacher's step also at batch 32, and
torch.compile for the teacher's step at batch 8. `--full` adds the other steps at batch 32, batch
128, dropout, BERT-base, and torch.compile everywhere. On a GPU: BERT-base and the compact model,
torch.compile at the batch of 64 in bf16 unless `--full` is given.

"eager" and "torch.compile" are the same step of the same code with every operation on its backend
"torch": plain PyTorch formulas. Among them is the counter-based noise that makes the updates equal,
which torch.randn would draw faster, and the decoder's cross-entropy in tiles. torch.compile has the
networks that `compile = true` compiles: those that are trained. Peak memory is what an update needs
beyond weights and the optimisers' moments.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.harness.race import Race
from benchmarks.harness.records import Row
from benchmarks.harness.timing import WallClock
from benchmarks.training.cases import DEFAULT, FULL, TEACHER, Update, work
from benchmarks.training.updates import Lineup, contenders

_SECONDS_EACH = {"cpu": 0.3, "cuda": 0.5}
_FEWEST = 3


@pytest.fixture
def steps(race: Race, device: torch.device) -> Race:
    """A race of whole updates, which last long and vary little."""
    return replace(
        race, stopwatch=WallClock(device), seconds_each=_SECONDS_EACH[device.type],
        fewest_rounds=_FEWEST, fewest_samples=_FEWEST,
    )  # fmt: skip


@pytest.mark.shapes(DEFAULT)
def test_training(
    steps: Race, shape: Update, device: torch.device, folder: Path, full: bool
) -> None:
    """An update of one network: data, noise, forward and backward passes, optimiser, average."""
    _time(steps, shape, device, folder, full)


@pytest.mark.shapes(FULL)
def test_training_full(
    steps: Race, shape: Update, device: torch.device, folder: Path, full: bool
) -> None:
    """An update of one network, in cases that take long."""
    if not full:
        pytest.skip("takes minutes; give --full")
    _time(steps, shape, device, folder, full)


def _time(race: Race, update: Update, device: torch.device, folder: Path, full: bool) -> None:
    lineup, rows = Lineup(update, device, folder), list[Row]()
    lineup.add_all(contenders(device), compile_too=full or _is_compiled(update, device))
    replace(race, report=rows.extend)(
        update.operation, update.case, lineup.calls, None, work(update), fields=lineup.fields,
        expected=lineup.expected,
    )  # fmt: skip
    # Updates that were skipped as non-finite are no updates: nothing of them is reported.
    lineup.check_guards()
    race.report(rows)


def _is_compiled(update: Update, device: torch.device) -> bool:
    """True if torch.compile is timed without --full."""
    case = update.case
    if device.type == "cpu":
        return update.step == TEACHER and case.batch == 8
    return case.model == "BERT-base" and case.batch == 64 and case.precision == "bf16"
