"""What a benchmark run leaves behind: rows, the environment they were measured in, a JSON file."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dlmone_fast

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


SCHEMA = 2
"""Of the records: raised when a reader of older ones would go wrong."""


@dataclass(frozen=True)
class Score:
    """A measure of quality with its 95 % interval, None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One implementation on one shape.

    Times are None where nothing was timed, and `note` says why; memory is what the call needs
    beyond its inputs. `ours` marks this package's backends, the preferred one of a case first. A
    percentile is the least time that so many per cent of the samples do not exceed: p99 is the
    longest one, where there are fewer than 100. `warmup` calls came before the samples and do not
    count. `derived` says how a time was computed that was not measured as a whole; "": it was.

    Of whole calls of `generate` also: `part`, the part of a call that the row is about ("" for all
    of it); `agreement`, the share of tokens that are those of fp32 on the same noise, and
    `trained_agreement`, the same of a trained model's answers; `error`, of a network's output, root
    of mean squares relative to fp32; `held_bytes`, GPU memory that is kept between calls, beyond
    the model's; `at`, the abscissa of a plot (a batch, a number of network calls); `scores`,
    quality by the name of its measure, of `rows_scored` samples.
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
    shape: str = ""
    dtype: str = ""
    warmup: int = 0
    mean_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    floor_ms: float | None = None
    derived: str = ""
    trained_agreement: float | None = None
    scores: Mapping[str, Score] | None = None
    rows_scored: int = 0


def find(rows: list[Row], operation: str, case: str, implementation: str) -> Row | None:
    """The row of an implementation, if it was measured."""
    key = (operation, case, implementation)
    return next((r for r in rows if (r.operation, r.case, r.implementation) == key), None)


def first_of_ours(rows: list[Row], operation: str, case: str) -> Row | None:
    """The row of the backend that comes first in our order of preference."""
    own = [r for r in rows if (r.operation, r.case) == (operation, case) and r.ours]
    return own[0] if own else None


_LIBRARIES = (
    "onnx", "onnxruntime", "openvino", "nncf", "ctranslate2", "transformers", "tokenizers",
    "faiss-cpu", "numpy", "sacrebleu", "matplotlib",
)  # fmt: skip
_MEASURED_FOLDERS = ("csrc", "dlmone_fast")
_BUILT = (".so", ".pyd", ".pyc", "_native_build.txt")
# A share of the cores: what an idle desktop has.
_IDLE_LOAD = 0.5
_GPU_QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit")


def environment(device: torch.device, load_at_start: float | None = None) -> dict[str, Any]:
    """Where and with what a run was made; None where a figure cannot be read here.

    Args:
        load_at_start: the load average before anything was measured.
    """
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "cpu_mhz": _cpu_mhz(),
        "gpu": _gpu(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "load_at_start": load_at_start,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "dlmone_fast": dlmone_fast.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "content_hash": content_hash(),
    }


def content_hash(root: Path = ROOT) -> str:
    """SHA-256 of the package's sources: names and bytes, nothing that was built."""
    digest = hashlib.sha256()
    for folder in _MEASURED_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and not path.name.endswith(_BUILT):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def caveat(record: Mapping[str, Any], tree: str | None = None) -> str:
    """What to know of a record before its figures are believed; "": nothing.

    Args:
        tree: the content hash to compare with; None: that of this checkout.
    """
    found = record["environment"]
    said = []
    if found["uncommitted_changes"]:
        said.append("measured with uncommitted changes")
    if found["content_hash"] != (tree or content_hash()):
        said.append("measured on another version of the code")
    if (load := found.get("load_at_start")) is not None and load > _IDLE_LOAD * found["cores"]:
        said.append(f"measured beside other work (load average {load:.1f} at the start)")
    return "; ".join(said)


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
    device: torch.device,
    machine: dict[str, Any],
    rows: list[Row],
    targets: list[dict[str, Any]],
    load_at_start: float | None = None,
) -> dict[str, Any]:
    """Everything that a run found, ready for JSON."""
    return {
        "environment": environment(device, load_at_start),
        "machine": machine,
        "rows": [asdict(row) for row in rows],
        "targets": targets,
    }


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """The rows of a record that was read back."""
    return [_row(dict(fields)) for fields in record["rows"]]


def _row(fields: dict[str, Any]) -> Row:
    if fields.get("scores") is not None:
        fields["scores"] = {name: Score(**score) for name, score in fields["scores"].items()}
    return Row(**fields)


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


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_mhz() -> float | None:
    """The mean clock of the cores now."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def _gpu(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks in MHz and power in W, as the driver's own tool reads them."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader"]
    command += ["-i", str(device.index or 0)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(_GPU_QUERY, values, strict=True)) if len(values) == len(_GPU_QUERY) else None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
