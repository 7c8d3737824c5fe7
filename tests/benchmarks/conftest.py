"""The benchmarks are a package of the repository, not of what is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tiny_timed import TINY

from benchmarks.generate.cases import Model, model


@pytest.fixture(scope="module")
def tiny() -> Model:
    return model(TINY, torch.device("cpu"))
