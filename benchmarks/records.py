"""What a benchmark run leaves behind: rows, the environment they were measured in, a JSON file."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dlmone_fast

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One implementation on one shape.

    Times are None where nothing was timed, and `note` says why; memory is what the call needs
    beyond its inputs. `ours` marks this package's backends; the first of a case is the one that
    "auto" takes. p99 is the least time that 99 % of the samples do not exceed: the longest one,
    where there are fewer than 100.

    Of whole calls of `generate` also: `part`, the part of a call that the row is about ("" for all
    of it); `agreement`, the share of tokens that are those of fp32 on the same noise; `error`, of a
    network's output, root of mean squares relative to fp32; `held_bytes`, GPU memory that is kept
    between calls, beyond the model's; `at`, the abscissa of a plot.
    """

    operation: str
    case: str
    implementation: str
    ours: bool
    median_ms: float | None = None
    min_ms: float | None = None
    samples: int = 0
    gigabytes_per_second: float | None = None
    teraflops: float | None = None
    fraction_of_floor: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    p99_ms: float | None = None
    part: str = ""
    agreement: float | None = None
    error: float | None = None
    held_bytes: int | None = None
    at: float | None = None


def find(rows: list[Row], operation: str, case: str, implementation: str) -> Row | None:
    """The row of an implementation, if it was measured."""
    key = (operation, case, implementation)
    return next((r for r in rows if (r.operation, r.case, r.implementation) == key), None)


def first_of_ours(rows: list[Row], operation: str, case: str) -> Row | None:
    """The row of the backend that "auto" takes."""
    own = [r for r in rows if (r.operation, r.case) == (operation, case) and r.ours]
    return own[0] if own else None


_LIBRARIES = ("onnx", "onnxruntime", "openvino", "nncf", "tokenizers", "faiss-cpu")


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a run was made."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "dlmone_fast": dlmone_fast.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU and how many threads it runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()} {torch.get_num_threads()} threads"


def save(record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a record to `folder`/<device>/<date>-<commit>.json and return its path."""
    found = record["environment"]
    date = re.sub(r"[^0-9T]", "", found["date"][:19])
    name = f"{date}-{(found['commit'] or 'unknown')[:9]}.json"
    path = folder / _folder_name(found["device"]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def record(
    device: torch.device, machine: dict[str, Any], rows: list[Row], targets: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything that a run found, ready for JSON."""
    return {
        "environment": environment(device),
        "machine": machine,
        "rows": [asdict(row) for row in rows],
        "targets": targets,
    }


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The rows of a record that was read back."""
    return [Row(**row) for row in record["rows"]]


def _folder_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
