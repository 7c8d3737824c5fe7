"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Without a GPU, Triton kernels run in its interpreter, on CPU tensors and only when asked for by
# name. Triton reads this when a kernel is defined, so it is set before any is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tiny tensors lose by more threads: waiting for each other costs more than the work.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of the reliability campaign runs."""
    group = parser.getgroup("reliability campaign")
    group.addoption(
        "--campaign",
        action="store_true",
        help="full counts in tests/reliability, and tests that compile for minutes",
    )
    group.addoption("--figures", metavar="FILE", help="write what tests/reliability measured, JSON")
    group.addoption(
        "--record-golden",
        action="store_true",
        help="write the losses that tests/reliability/test_golden_losses.py compares with",
    )


@pytest.fixture(scope="session")
def campaign(request: pytest.FixtureRequest) -> bool:
    """Whether full counts are asked for; otherwise a part that fits in every test run."""
    return bool(request.config.getoption("campaign"))


def _optional_directory(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.is_dir():
        pytest.skip(f"{variable} names no directory here: {path}")
    return path


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Recorded outputs of the original implementation."""
    return _optional_directory("DLMONE_GOLDEN_DIR", ROOT.parent / "shared" / "golden")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The paper's data sets."""
    return _optional_directory("DLMONE_DATA_DIR", ROOT.parent / "shared" / "data")
