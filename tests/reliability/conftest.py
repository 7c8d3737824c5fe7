"""Fixtures of the campaign: how much of it runs, and where its figures go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Figure = Callable[[str, str, str, str], None]

_FIGURES = pytest.StashKey[list[dict[str, str]]]()


@pytest.fixture(scope="session")
def campaign(request: pytest.FixtureRequest) -> bool:
    """Whether full counts are asked for; otherwise a part that fits in every test run."""
    return bool(request.config.getoption("campaign"))


@pytest.fixture(scope="session")
def figure(request: pytest.FixtureRequest) -> Figure:
    """Takes what a test has shown, after its last assertion: number, subject, target, measured.

    Numbers are those of docs/reliability.md; a number may have several subjects.
    """
    found = request.config.stash.setdefault(_FIGURES, [])

    def take(number: str, subject: str, target: str, measured: str) -> None:
        row = {"number": number, "subject": subject, "target": target, "measured": measured}
        found.append(row)

    return take


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the figures, and whether everything passed."""
    path = session.config.getoption("figures")
    if path:
        figures = session.config.stash.get(_FIGURES, [])
        text = json.dumps({"exit_status": int(exitstatus), "figures": figures}, indent=1)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")
