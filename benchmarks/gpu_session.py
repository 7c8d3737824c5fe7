"""Tests and benchmarks on a GPU, by part: `OUT=folder python -m benchmarks.gpu_session kernels`.

A part takes ten minutes. It builds the extension in place, runs its tests (those of CUDA kernels
also under CUDA's compute-sanitizer, where that is installed), then its benchmarks. The parts:
`kernels`; `generate`, whole calls beside other libraries; `latency`, the latency study;
`alternatives`, autoregressive models; `scaling`, whole calls against batch, length and so on;
`training`, training steps.

Each step has a log in $OUT (default: gpu-session) and a time limit; a step that fails or is cut off
stops none of the others. $OUT/summary.json has the outcome of each. No network is needed, and
nothing installed but torch, pytest and, for the benchmarks, pytest-benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness.records import RESULTS, ROOT
from dlmone_fast.cli import run_command

_SECONDS = 570
PARTS = {
    "kernels": ("tests/kernels", "benchmarks/kernels"),
    "generate": ("tests/runtime/engines", "benchmarks/generate/bench_calls.py"),
    "latency": ("tests/samplers", "benchmarks/generate/bench_latency.py"),
    "alternatives": (
        "tests/benchmarks/generate/test_autoregressive.py",
        "benchmarks/generate/bench_alternatives.py",
    ),
    "scaling": ("tests/runtime/test_generator.py", "benchmarks/generate/bench_scaling.py"),
    "training": ("tests/training/test_updates.py", "benchmarks/training"),
}
"""Tests of each part, and the benchmarks that run after them."""

# Seconds that pytest may take to write its record after it was asked to stop.
_GRACE = 20
_TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Step:
    """A command, the most seconds it may take, and those it must leave for later steps."""

    name: str
    command: Sequence[str]
    limit: int
    leave: int = 0


@dataclass(frozen=True)
class Outcome:
    """The end of a step; `exit_code` is None where it was cut off or did not start."""

    name: str
    exit_code: int | None
    seconds: float
    note: str = ""


def steps(out: Path, part: str) -> list[Step]:
    """The steps of a part, in order."""
    python = sys.executable
    tests, benchmarks = PARTS[part]
    found = [
        Step("machine", ["nvidia-smi"], 20, 480),
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 180, 330),
        Step("tests", [python, *_TESTS, tests, "--maxfail=40"], 180, 270),
    ]
    memcheck = shutil.which("compute-sanitizer") or _in_toolkit("compute-sanitizer")
    if memcheck and part == "kernels":
        command = [memcheck, "--tool", "memcheck", "--error-exitcode", "77", python, *_TESTS]
        command += ["tests/kernels", "-k", "cuda", "-x"]
        found.append(Step("memcheck", command, 90, 240))
    timed = [python, "-m", "pytest", benchmarks, "--benchmark-only", "-q"]
    timed += ["--device", "cuda", "--save-records", f"--benchmark-json={out / 'benchmark.json'}"]
    return [*found, Step(part, timed, 400)]


def run_all(found: list[Step], out: Path, seconds: float = _SECONDS) -> list[Outcome]:
    """Run the steps within `seconds` altogether; summary.json grows with each."""
    ends = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for step in found:
        left = ends - time.monotonic()
        outcomes.append(_run(step, min(step.limit, left - step.leave), out))
        print(f"{step.name}: {_described(outcomes[-1])}", flush=True)
        summary = json.dumps([asdict(outcome) for outcome in outcomes], indent=1)
        (out / "summary.json").write_text(summary + "\n", encoding="utf-8")
    return outcomes


def _run(step: Step, limit: float, out: Path) -> Outcome:
    if limit <= 0:
        return Outcome(step.name, None, 0.0, "no time was left for it")
    started = time.monotonic()
    with (out / f"{step.name}.log").open("w", encoding="utf-8") as log:
        try:
            # In a session of its own the step is cut off together with all that it started.
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=_environment(), stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome(step.name, None, 0.0, str(error))
        try:
            code, note = process.wait(limit), ""
        except subprocess.TimeoutExpired:
            _stop(process)
            code, note = None, f"cut off after {limit:.0f} s"
    return Outcome(step.name, code, round(time.monotonic() - started, 1), note)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask first: a benchmark that is interrupted still writes what it has measured."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment() -> dict[str, str]:
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _in_toolkit(name: str) -> str | None:
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    paths = [Path(folder) / "bin" / name for folder in folders if folder]
    return next((str(path) for path in paths if path.exists()), None)


def _described(outcome: Outcome) -> str:
    state = outcome.note or ("passed" if outcome.exit_code == 0 else f"exit {outcome.exit_code}")
    return f"{state} in {outcome.seconds:.0f} s"


def main() -> int:
    """Run every step of the part named first; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(PARTS))
    part = parser.parse_args().part
    out = Path(os.environ.get("OUT", "gpu-session")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    before = set(RESULTS.rglob("*.json"))
    outcomes = run_all(steps(out, part), out)
    for record in set(RESULTS.rglob("*.json")) - before:
        shutil.copy(record, out / f"{record.parent.name}-{record.name}")
    return int(any(outcome.exit_code != 0 for outcome in outcomes))


if __name__ == "__main__":
    run_command(main)
