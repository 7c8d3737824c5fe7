"""Every Triton kernel compiles for A100 and H100 without a GPU, and keeps its values in registers.

In a process of its own: under TRITON_INTERPRET, which other tests set, there is no compiler.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

PLANTED = """
import triton
import triton.language as tl
from dlmone_fast.kernels.triton.support import Build

@triton.jit
def wide_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = tl.load(x + at)
    tl.store(out + at, values - tl.sum(values))

@triton.jit
def narrow_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at))

@triton.jit
def broken_kernel(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), unknown)

@triton.jit
def forgotten_kernel(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), 0.0)

@triton.jit
def launched_under_another_name(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), 0.0)

@triton.jit
def called_by_kernels(x):
    return x

def launch(x):
    launched_under_another_name[(1,)](x, 16)

POINTERS = {"x": "*fp32", "out": "*fp32"}
SHIPPED = (
    Build(wide_kernel, POINTERS, {"SIZE": 16384}, num_warps=1),
    Build(narrow_kernel, POINTERS, {"SIZE": 256}),
    Build(broken_kernel, {"x": "*fp32"}, {"SIZE": 16}),
)
"""


def check(cache: Path, *arguments: str, path: Path | None = None) -> tuple[int, list[Any], str]:
    """Runs the check: its exit code, what it found of every configuration, its complaints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    paths = [str(Path(__file__).resolve().parents[2]), *([str(path)] if path else [])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", "dlmone_fast.kernels.triton.aot", "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_shipped_kernels_compile_and_do_not_spill(tmp_path: Path):
    # fp16 differs from bf16 in conversions alone; `make aot` compiles everything everywhere.
    code, usages, complaints = check(tmp_path, "--jobs", "2", "--quick")
    assert (code, complaints) == (0, "")
    assert {usage["arch"] for usage in usages} == {80, 90}
    assert all(0 < usage["registers"] <= 255 for usage in usages)
    # An SM of an A100 has 163 KiB for one block, of an H100 227 KiB.
    assert all(usage["shared"] <= (163 if usage["arch"] == 80 else 227) * 1024 for usage in usages)


def test_what_spills_fails_or_is_left_out_is_named(tmp_path: Path):
    (tmp_path / "planted.py").write_text(PLANTED)
    code, usages, complaints = check(
        tmp_path / "cache", "--modules", "planted", "--arch", "90", path=tmp_path
    )
    assert code == 1
    spilled = {usage["kernel"]: usage["spill_stores"] for usage in usages}
    assert spilled["wide_kernel"] > 0
    assert spilled["narrow_kernel"] == 0
    assert "wide_kernel spills registers on sm_90" in complaints
    assert "broken_kernel on sm_90" in complaints
    assert "planted.forgotten_kernel is in no SHIPPED" in complaints
    assert "planted.launched_under_another_name is in no SHIPPED" in complaints
    assert "narrow_kernel" not in complaints
    assert "called_by_kernels" not in complaints
