"""R15: no call of the extension, however wrong, reads or writes what it was not given.

`.ci/sanitize` builds the extension with AddressSanitizer and UBSan and runs its tests under both,
and its report is read here; the other half are random calls, in the build that is installed and in
the instrumented one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import sanitized
import torch
from figures import Figure
from native_cases import ENTRIES, guarded, guards_hold
from native_fuzz import change_one

from dlmone_fast.kernels import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INSTRUMENTED = sanitized.FOLDER / "lib"


def fuzz(seconds: float, first: int, folder: Path = ROOT, **environment: str) -> dict[str, int]:
    command = [sys.executable, str(HERE / "native_fuzz.py"), "--seconds", str(seconds)]
    paths = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [*command, "--first", str(first)],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        cwd=folder, capture_output=True, text=True, timeout=10 * seconds + 300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout)
    assert Path(counts.pop("library")).is_relative_to(folder)
    return counts


def counted(counts: dict[str, int]) -> str:
    return (
        f"{counts['calls']:,} calls, {counts['refused']:,} of them refused: "
        "0 crashes, 0 writes outside, 0 wrong results"
    )


def test_random_calls_are_right_refused_or_inside(campaign: bool, figure: Figure) -> None:
    seconds = 60 if campaign else 5
    counts = fuzz(seconds, first=0)
    for outcome in ("right", "refused", "accepted"):
        assert counts[outcome] > 0.01 * counts["calls"], counts
    figure("R15", "native entry points, random calls", f"{seconds} s, 0 findings", counted(counts))


def test_the_suite_has_passed_in_the_instrumented_build(campaign: bool, figure: Figure) -> None:
    if not campaign:
        pytest.skip("part of the full counts alone")
    counts = sanitized.read()
    assert counts["failures"] == counts["errors"] == 0, counts
    passed = counts["tests"] - counts["skipped"]
    assert passed > 400, counts
    figure(
        "R15", "the extension's tests under ASan and UBSan", "all of them, 0 reports",
        f"{passed:,} tests passed, {counts['skipped']} skipped for what the CPU or the code lacks, "
        "0 reports",
    )  # fmt: skip


def test_random_calls_in_the_instrumented_build(campaign: bool, figure: Figure) -> None:
    if not campaign:
        pytest.skip("part of the full counts alone")
    sanitized.read()
    compiler = os.environ.get("CXX", "g++")
    preloaded = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        "LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }  # fmt: skip
    firsts = (10**6, 10**7)
    with ThreadPoolExecutor(len(firsts)) as pool:
        found = pool.map(lambda first: fuzz(150, first, INSTRUMENTED, **environment), firsts)
        parts = [Counter(counts) for counts in found]
    figure(
        "R15", "native entry points, random calls under ASan and UBSan",
        "5 minutes (2 processes of 150 s), 0 reports", counted(sum(parts, Counter())),
    )  # fmt: skip


def test_every_entry_point_has_a_case():
    made = {entry(Random(0)).entry for entry in ENTRIES}
    # What a GPU's build adds cannot be called without one.
    offered = {
        name
        for name in dir(native.module())
        if callable(getattr(native.module(), name)) and not name.startswith(("_", "cuda_"))
    }
    assert made == offered - {"cpu_paths"}


def test_the_fuzzer_sees_what_it_looks_for():
    tensor = guarded((3, 5), torch.float32)
    tensor.fill_(1.0)
    assert guards_hold(tensor)
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    memory[(tensor.storage_offset() + tensor.numel()) * 4] = 0
    assert not guards_hold(tensor)
    # Of the changes some must be refused, whatever else is asked.
    verdicts = {change_one(Random(i), ENTRIES[i % len(ENTRIES)](Random(i))) for i in range(60)}
    assert verdicts == {True, None}
