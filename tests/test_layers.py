from __future__ import annotations

from pathlib import Path

import pytest

importlinter = pytest.importorskip("importlinter.cli", reason="import-linter is in the dev extra")

ROOT = Path(__file__).resolve().parent.parent


def test_imports_respect_the_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(ROOT)
    status = importlinter.lint_imports(
        config_filename=str(ROOT / "pyproject.toml"), cache_dir=str(tmp_path)
    )
    assert status == importlinter.EXIT_STATUS_SUCCESS, "run lint-imports to see the broken imports"
