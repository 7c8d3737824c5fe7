"""Workers and their threads, on one machine and on those of a cluster."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dlmone_fast.bulk.resources import (
    Machine,
    cluster_machines,
    device_kind,
    share,
    this_machine,
    usable_cores,
)
from dlmone_fast.errors import UsageError

GPU_NODE, HEAD, THIN = Machine(16, 4), Machine(8), Machine(2)


def test_a_cluster_s_machines_are_those_that_live():
    nodes: list[dict[str, Any]] = [
        {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0, "memory": 1e9}},
        {"Alive": True, "Resources": {"memory": 1e9}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    ray = SimpleNamespace(nodes=lambda: nodes)
    assert cluster_machines(ray) == [GPU_NODE, Machine(0)]


@pytest.mark.parametrize(
    ("machines", "device", "workers", "shards", "expected"),
    [
        ([Machine(8)], "cpu", 0, 100, (2, 4)),
        ([Machine(9)], "cpu", 0, 100, (2, 4)),
        ([Machine(8)], "cpu", 3, 100, (3, 2)),
        ([Machine(8)], "cpu", 0, 1, (1, 8)),
        ([Machine(2)], "cpu", 5, 100, (5, 1)),
        ([Machine(16, 4)], "cuda", 0, 100, (4, 4)),
        # A worker's threads are those of the machine that has its GPU.
        ([HEAD, GPU_NODE, GPU_NODE], "cuda", 0, 100, (8, 4)),
        ([HEAD, GPU_NODE], "cpu", 0, 100, (6, 4)),
        ([THIN] * 10, "cpu", 0, 100, (10, 2)),
        ([Machine(0), THIN], "cpu", 0, 100, (1, 2)),
        ([], "cpu", 0, 100, (1, 1)),
    ],
)
def test_every_worker_fits_into_a_machine(
    machines: list[Machine], device: str, workers: int, shards: int, expected: tuple[int, int]
):
    assert share(machines, device, workers, shards) == expected


def test_a_gpu_is_looked_for_where_the_workers_are(monkeypatch: pytest.MonkeyPatch):
    # Whatever the machine that asks has.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_kind([HEAD, GPU_NODE], "auto", 0) == "cuda"
    assert device_kind([HEAD, GPU_NODE], "cuda", 0) == "cuda"
    assert device_kind([HEAD, GPU_NODE], "cpu", 0) == "cpu"
    assert device_kind([HEAD], "auto", 0) == "cpu"
    with pytest.raises(UsageError, match=r"--device cuda: expected a GPU, .*use --device cpu"):
        device_kind([HEAD], "cuda", 0)
    # A cluster that grows when it is asked to.
    assert device_kind([HEAD], "cuda", 2) == "cuda"


def test_a_system_that_does_not_say_which_cores_counts_all(monkeypatch: pytest.MonkeyPatch):
    assert this_machine("cpu") == [Machine(usable_cores())]
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert usable_cores() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1
