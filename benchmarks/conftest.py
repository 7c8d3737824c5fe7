"""Fixtures of the benchmarks: the device, its rates, and `race`, which times one case.

pytest benchmarks --benchmark-only [-k kernels|test_generate|alternatives|latency|scaling|training]
    [--full] [--device cpu|cuda] [--save-records]
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.generate import latency
from benchmarks.generate import targets as generate_targets
from benchmarks.generate.trained import TrainedGate
from benchmarks.harness import records
from benchmarks.harness.floors import Machine, measure_machine
from benchmarks.harness.race import Race
from benchmarks.harness.targets import judge
from benchmarks.harness.timing import Stopwatch, WallClock
from benchmarks.kernels import targets as kernel_targets
from benchmarks.report import tables
from dlmone_fast.release.environment import device_name

# Libraries' threads wait awake for some milliseconds after a call, at the next one's cost.
_SHORT_SECONDS = 0.02
_ROWS = pytest.StashKey[list[records.Row]]()
_MACHINE = pytest.StashKey[Machine]()
_DEVICE = pytest.StashKey[torch.device]()
_LOAD = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that only benchmarks have."""
    group = parser.getgroup("benchmarks beside peers")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    group.addoption(
        "--full",
        action="store_true",
        help="also the long measurements: see the benchmarks' own descriptions",
    )
    group.addoption("--save-records", action="store_true",
                    help="write benchmarks/results/<device>/<date>-<commit>.json")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device, and register the marker that gives a benchmark its shapes."""
    name = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    config.stash[_DEVICE] = torch.device(name)
    config.stash[_ROWS] = []
    config.stash[_LOAD] = os.getloadavg()[0]
    config.addinivalue_line("markers", "shapes(by_device): the `shape`s to time on each device")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each shape of the marker `shapes` that is for this device."""
    marker = metafunc.definition.get_closest_marker("shapes")
    if marker is not None:
        shapes = marker.args[0][metafunc.config.stash[_DEVICE].type]
        metafunc.parametrize("shape", shapes, ids=[_identifier(s) for s in shapes])


def _identifier(shape: object) -> str:
    return str(shape).replace(" ", "-").replace("×", "x")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that is timed."""
    return request.config.stash[_DEVICE]


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """True if the long measurements are asked for."""
    return bool(request.config.getoption("full"))


@pytest.fixture
def report_rows(request: pytest.FixtureRequest) -> Callable[[list[records.Row]], None]:
    """A function that adds rows to the run's record."""
    return request.config.stash[_ROWS].extend


@pytest.fixture(scope="session")
def stopwatch(device: torch.device) -> Stopwatch:
    """Times single calls on the device."""
    return Stopwatch(device)


@pytest.fixture(scope="session")
def machine(
    request: pytest.FixtureRequest, device: torch.device, stopwatch: Stopwatch
) -> Machine:  # fmt: skip
    """Rates of the device, measured once a run."""
    found = measure_machine(device, device_name(device), stopwatch)
    request.config.stash[_MACHINE] = found
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for exported networks, removed afterwards, because they are large."""
    path = tmp_path_factory.mktemp("networks")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def gate(device: torch.device, folder: Path) -> TrainedGate:
    """The check that lower precisions must pass before they are timed."""
    return TrainedGate(device, folder)


@pytest.fixture
def race(
    benchmark: Any,
    stopwatch: Stopwatch,
    machine: Machine,
    report_rows: Callable[[list[records.Row]], None],
) -> Race:
    """A race: it checks implementations and times them in turns."""
    # Compiled peers of earlier cases count against a limit of torch's.
    torch._dynamo.reset()
    return Race(benchmark, stopwatch, machine, report_rows)


@pytest.fixture
def whole(race: Race, device: torch.device) -> Race:
    """A race of whole calls."""
    return replace(race, stopwatch=WallClock(device), short_seconds=_SHORT_SECONDS)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The rows of all cases with ratios, the targets, and the record if it was asked for."""
    rows, found = config.stash[_ROWS], config.stash.get(_MACHINE, None)
    if not rows or found is None:
        return
    device = config.stash[_DEVICE]
    judged = [
        outcome
        for suite in (kernel_targets.TARGETS, generate_targets.TARGETS, latency.TARGETS)
        for outcome in judge(rows, device.type, found.copy, suite)
    ]
    record = records.record(device, found.record(), rows, judged, config.stash[_LOAD])
    terminalreporter.section("dlmone_fast beside its peers")
    terminalreporter.write_line(tables.markdown(record))
    if config.getoption("save_records"):
        path = records.save(record)
        terminalreporter.write_line(f"\nrecord: {path.relative_to(records.ROOT)}")
