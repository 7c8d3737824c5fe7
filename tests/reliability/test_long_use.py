"""R18 and R19: prompts and models come and go, and leave no memory, threads or files behind."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from installed import skip_without

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module", params=["eager", "openvino"])
def measured(request: pytest.FixtureRequest, campaign: bool) -> dict[str, Any]:
    """What long_use.py found for a backend, after the counts of this speed."""
    if importlib.util.find_spec("psutil") is None or not Path("/proc/self/statm").exists():
        pytest.skip("reads a process's memory and threads by psutil and Linux's /proc")
    if request.param != "eager":
        skip_without(request.param)
    prompts, loads = (50_000, 200) if campaign else (1_200, 16)
    paths = os.pathsep.join([str(HERE.parent), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(HERE / "long_use.py"), request.param, str(prompts), str(loads)],
        # One arena for all threads: a new thread may get a new one, a megabyte that is no leak.
        env={
            **os.environ, "MALLOC_ARENA_MAX": "1", "OMP_WAIT_POLICY": "passive",
            "PYTHONPATH": paths,
        },
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert Path(found["library"]).is_relative_to(ROOT)
    return {"backend": request.param, **found}


def test_prompts_leave_no_memory_behind(measured, campaign, figure):  # type: ignore[no-untyped-def]
    soak = measured["soak"]
    first, *_, half, _, last = soak["bytes"]
    grown = [reading / first - 1 for reading in (half, last)]
    # A leak has less time to show in a short soak.
    assert max(grown) < (0.01 if campaign else 0.003), soak["bytes"]
    figure(
        "R18",
        f"{measured['backend']}, on a CPU",
        "50,000 prompts of random words: memory grows by less than 1 %",
        f"{soak['prompts']:,} prompts in {soak['calls']:,} calls: {grown[0]:+.2%} half way, "
        f"{grown[1]:+.2%} at the end, of {first / 2**20:.0f} MiB",
    )


def test_models_that_were_unloaded_leave_nothing_behind(measured, campaign, figure):  # type: ignore[no-untyped-def]
    cycles = measured["cycles"]
    held, weights = cycles["bytes"], cycles["weights"]
    # Few cycles cannot tell a slope from the allocator's own ups and downs as well as many can.
    most = weights * (0.003 if campaign else 0.02)
    slope = statistics.median(
        (b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(held), 2)
    )
    assert slope < most, held
    for name in ("threads", "files"):
        assert cycles[name][-1] == cycles[name][0], (name, cycles[name])
    figure(
        "R19",
        f"{measured['backend']}, on a CPU",
        f"200 loads and unloads: under {most / 1024:.0f} KiB each, threads and files as before",
        f"{len(held) - 1} times a model of {weights / 2**20:.0f} MiB: {slope / 1024:+.1f} KiB "
        f"each, {cycles['threads'][-1]} threads and {cycles['files'][-1]} open files as before",
    )
