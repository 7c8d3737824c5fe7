"""Facts of a measurement: the sources' hash, and the checkout that they lie in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from dlmone_fast.release import environment as module
from dlmone_fast.release.environment import content_hash, environment


def test_the_content_hash_is_of_names_and_bytes_and_of_nothing_built(tmp_path: Path):
    source = tmp_path / "dlmone_fast" / "a.py"
    source.parent.mkdir()
    source.write_text("x = 1")
    first = content_hash(tmp_path)
    (tmp_path / "dlmone_fast" / "_C.so").write_bytes(b"built")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "b.py").write_text("y = 2")
    assert content_hash(tmp_path) == first
    source.write_text("x = 2")
    changed = content_hash(tmp_path)
    source.rename(source.with_name("c.py"))
    assert len({first, changed, content_hash(tmp_path)}) == 3


def test_an_installed_package_does_not_report_the_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    installed = tmp_path / "site-packages"
    (installed / "dlmone_fast").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    commit = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "theirs"]
    subprocess.run([*commit, "--allow-empty"], cwd=tmp_path, check=True)
    monkeypatch.setattr(module, "ROOT", installed)
    facts = environment(torch.device("cpu"))
    assert (facts["commit"], facts["uncommitted_changes"]) == (None, False)
    (installed / "pyproject.toml").write_text("")
    assert environment(torch.device("cpu"))["commit"]
