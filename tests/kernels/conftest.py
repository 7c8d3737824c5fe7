"""What every kernel test needs: poisoned memory, and the device that kernels run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dlmone_fast.kernels import native


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN (or the largest integer): an element left out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def teams_for_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases, too, run on as many threads as torch has: a race among them would show."""
    monkeypatch.setattr(native, "_WORTH_A_TEAM_NS", 0.0)


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one; else the CPU, where Triton kernels are interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
