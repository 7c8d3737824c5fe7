"""Where a job's workers find room: the processors and GPUs of this machine or of a cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dlmone_fast.errors import UsageError

_CORES_A_WORKER = 4


@dataclass(frozen=True)
class Machine:
    """What one machine has for workers."""

    cores: int
    gpus: int = 0


def this_machine(device: str) -> list[Machine]:
    """This machine alone.

    Raises:
        UsageError: the device is not there.
    """
    from dlmone_fast.models.devices import pick_device

    gpus = 0
    if pick_device(device).type == "cuda":
        import torch

        gpus = torch.cuda.device_count()
    return [Machine(usable_cores(), gpus)]


def usable_cores() -> int:
    """Cores that this process may use; where the system does not say which, all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cluster_machines(ray: Any) -> list[Machine]:
    """The machines of the cluster that Ray is connected to."""
    owned = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Machine(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in owned]


def device_kind(machines: Sequence[Machine], device: str, workers: int) -> str:
    """cpu or cuda, of auto (GPUs if there are any), cpu or cuda.

    Raises:
        UsageError: no machine has a GPU, and cuda was asked for.
    """
    gpus = sum(machine.gpus for machine in machines)
    # A cluster that grows by itself may have none yet.
    if device == "cuda" and not (gpus or workers):
        raise UsageError(
            f"--device cuda: expected a GPU, got none on {len(machines)} machines; use "
            "--device cpu, or name --workers if the cluster grows by itself"
        )
    if device == "auto":
        return "cuda" if gpus else "cpu"
    return device


def share(machines: Sequence[Machine], device: str, workers: int, shards: int) -> tuple[int, int]:
    """Workers and the threads of each, so that every worker fits into one machine.

    Args:
        machines: what there is.
        device: cpu or cuda.
        workers: how many; 0: one a GPU, or one for each 4 cores and one for what has fewer.
        shards: more workers than these would have nothing to do.
    """
    if not workers and device == "cuda":
        workers = sum(machine.gpus for machine in machines)
    elif not workers:
        workers = sum(max(1, m.cores // _CORES_A_WORKER) for m in machines if m.cores)
    workers = max(1, min(workers, shards))
    most = max((machine.cores for machine in machines), default=1)
    fitting = (n for n in range(most, 1, -1) if _room(machines, device, n) >= workers)
    return workers, next(fitting, 1)


def _room(machines: Sequence[Machine], device: str, threads: int) -> int:
    """How many workers of so many threads there is room for."""
    free = ((machine.cores // threads, machine.gpus) for machine in machines)
    return sum(min(cores, gpus) if device == "cuda" else cores for cores, gpus in free)
