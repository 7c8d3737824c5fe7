"""The tiny run, and the same run finished once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import tiny_config
from torch import Tensor

from dlmone_fast.config import Config
from dlmone_fast.training import RunResult, run

PHASES = ("teacher", "stage1", "stage2")

Make = Callable[..., Config]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose more than they gain by sharing work: tenfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> Make:
    return tiny_config


@pytest.fixture(scope="session")
def finished(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """An uninterrupted run of all phases. Do not write to it."""
    return run(tiny_config(tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture(scope="session")
def records(finished: RunResult) -> list[dict[str, Any]]:
    """The lines of the finished run's metrics.jsonl."""
    return read_records(finished.root)


def read_records(root: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"metrics.jsonl holds {constant}, which is not JSON")

    lines = (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, Tensor]]:
    return lambda folder: load_file(folder / "model.safetensors")


@pytest.fixture(scope="session")
def same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    """Whether two sets of tensors are equal bit for bit."""
    return lambda a, b: set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
