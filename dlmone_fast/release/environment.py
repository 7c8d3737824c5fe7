"""Facts about a measurement that its figures depend on: device, machine, versions, sources."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dlmone_fast

ROOT = Path(__file__).resolve().parents[2]
"""The checkout; of an installed package, the folder that it is installed in."""

SCHEMA = 2
"""Version of the format, raised when a reader of older records would go wrong."""

_LIBRARIES = (
    "onnx", "onnxruntime", "openvino", "nncf", "ctranslate2", "transformers", "tokenizers",
    "faiss-cpu", "numpy", "sacrebleu", "matplotlib",
)  # fmt: skip
_MEASURED_FOLDERS = ("csrc", "dlmone_fast")
_BUILT = (".so", ".pyd", ".pyc", "_native_build.txt")
_GPU_QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit")


def environment(device: torch.device, load_at_start: float | None = None) -> dict[str, Any]:
    """Device, machine, versions and sources of a run; None where a figure cannot be read here.

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


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU and how many threads it runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()} {torch.get_num_threads()} threads"


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
    """Output of a git command on the checkout that this package lies in; None without one."""
    # Around an installed package git would find the repository of whoever installed it.
    if not (ROOT / "pyproject.toml").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
