"""Fixtures of the campaign, and where its figures go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from figures import Figure
from trainings import TrainingServer, build_faults, everything_on, write_config

from dlmone_fast.release.environment import environment

_FIGURES = pytest.StashKey[list[dict[str, str | bool]]]()


@pytest.fixture(scope="session")
def figure(request: pytest.FixtureRequest) -> Figure:
    """Takes what a test has shown, after its last assertion: number, subject, target, measured.

    Numbers are those of docs/reliability.md; a number may have several subjects.
    """
    found = request.config.stash.setdefault(_FIGURES, [])

    def take(
        number: str, subject: str, target: str, measured: str, *, in_part: bool = False
    ) -> None:
        found.append({
            "number": number, "subject": subject, "target": target, "measured": measured,
            "in_part": in_part,
        })  # fmt: skip

    return take


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    """Starts real training commands within milliseconds."""
    folder = tmp_path_factory.mktemp("server")
    started = TrainingServer(folder, build_faults(folder))
    yield started
    started.close()


@pytest.fixture(scope="session")
def uninterrupted(server: TrainingServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that every interrupted one must end as. Do not write to it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = write_config(everything_on("run"), folder / "config.toml")
    assert server.run(config, folder / "log") == 0, (folder / "log").read_text()
    return folder / "run"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the figures, where they were measured, and whether everything passed."""
    path = session.config.getoption("figures")
    if path:
        found = {
            "exit_status": int(exitstatus),
            "campaign": bool(session.config.getoption("campaign")),
            "environment": environment(torch.device("cpu")),
            "figures": session.config.stash.get(_FIGURES, []),
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
