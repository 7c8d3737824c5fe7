"""What every kernel test needs: poisoned memory, and the device that kernels run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN (or the largest integer): an element left out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one; else the CPU, where Triton kernels are interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
