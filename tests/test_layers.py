from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter is in the dev extra")

ROOT = Path(__file__).resolve().parent.parent


def test_imports_respect_the_layers(tmp_path: Path):
    # In a process of its own: it sets up logging, which switches off the loggers that exist.
    code = (
        "import sys; from importlinter.cli import lint_imports\n"
        "config, cache = sys.argv[1:]\n"
        "sys.exit(lint_imports(config_filename=config, cache_dir=cache))"
    )
    config, cache = str(ROOT / "pyproject.toml"), str(tmp_path)
    command = [sys.executable, "-c", code, config, cache]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
