"""The package and its commands' --help answer at once: nothing heavy loads on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from startup import best_seconds, seconds_allowed

import dlmone_fast

PACKAGE = Path(dlmone_fast.__file__).parent
HEAVY = ("torch", "numpy", "triton", "tokenizers", "safetensors", "sacrebleu")
COMMANDS = [
    name
    for name in (
        "train", "evaluate", "sample", "serve", "generate_bulk", "import_diffuseq", "doctor",
        "release",
    )
    if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name / "__main__.py").exists()
]  # fmt: skip


def heavy_modules_after(statement: str) -> str:
    code = f"import sys; {statement}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module", ["dlmone_fast", "dlmone_fast.kernels", "dlmone_fast.kernels.native"]
)
def test_import_loads_nothing_heavy(module: str):
    assert heavy_modules_after(f"import {module}") == "[]"


def test_import_is_fast():
    assert best_seconds(["-c", "import dlmone_fast"]) < seconds_allowed()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_fast(command: str):
    assert best_seconds(["-m", f"dlmone_fast.{command}", "--help"]) < seconds_allowed()


def test_triton_is_not_loaded_by_an_operation():
    code = "import sys, dlmone_fast.kernels.nearest_token; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
