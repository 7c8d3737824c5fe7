"""Nothing that a command prints is lost, whatever letters its terminal has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

COMMANDS = (
    "train", "evaluate", "sample", "serve", "doctor", "generate_bulk", "import_diffuseq",
    "kernels.triton.aot",
)  # fmt: skip


def command(encoding: str, name: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command whose output has this encoding; its output is what was written."""
    done = subprocess.run(
        [sys.executable, "-m", f"dlmone_fast.{name}", *arguments], capture_output=True, timeout=120,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}, check=False,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_printed_in_ascii(name: str):
    done = command("ascii", name, "--help")
    assert done.returncode == 0
    assert b"usage: " in done.stdout
    done.stdout.decode("ascii")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_plan_is_printed(encoding: str):
    done = command(encoding, "train", "--dry-run")
    assert done.returncode == 0
    assert b"\\u03c6" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:replace"])
def test_a_report_is_written_and_then_printed(tmp_path: Path, encoding: str):
    rows = [{"source": text, "reference": text, "recover": text} for text in tiny.prompts(4)]
    file, output = tmp_path / "φ.jsonl", tmp_path / "scores.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command(
        encoding, "evaluate", "--generations", str(file), "--bootstrap", "10", "--output",
        str(output),
    )  # fmt: skip
    assert done.returncode == 0
    assert json.loads(output.read_text())["exact_copy"] == 1
    # Somebody's own choice of what becomes of other letters is kept.
    shown = {"ascii": b"\\xb1", "latin-1": b"\xb1", "ascii:replace": b"?"}[encoding]
    assert b" " + shown + b" " in done.stdout


def test_a_result_is_kept_where_printing_fails(tmp_path: Path):
    rows = [{"source": text, "reference": text, "recover": text} for text in tiny.prompts(4)]
    file, output = tmp_path / "in.jsonl", tmp_path / "scores.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--generations", str(file), "--bootstrap", "0", "--output", str(output)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-u", "-m", "dlmone_fast.evaluate", *arguments], stdout=full,
            stderr=subprocess.PIPE, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 4
    assert json.loads(output.read_text())["exact_copy"] == 1
