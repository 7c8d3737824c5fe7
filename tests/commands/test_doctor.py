from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import tiny

from dlmone_fast import doctor


def test_a_working_installation(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = tiny.save(tmp_path / "model")
    assert doctor.main(["--json", "--model", str(folder)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert set(report["self_test"].values()) == {"ok"}
    assert report["versions"]["torch"] != "not installed"
    assert report["kernels"]["nearest_token on cpu"]["torch"] == "usable"
    assert "on" in report["precision"]["generation"]


def test_a_damaged_model_ends_with_4(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = tiny.save(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"")
    assert doctor.main(["--model", str(folder)]) == 4
    printed = capsys.readouterr().out
    assert f"model {folder}: failed: " in printed
    assert "FAILED" in printed


def test_a_failing_check_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(doctor, "_check_noise", lambda: doctor._require(False, "other words"))
    assert doctor.main([]) == 4
    assert "philox known answer: failed: RuntimeError: other words" in capsys.readouterr().out


def test_without_torch_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = builtins.__import__

    def without_torch(name: str, *rest: object, **named: object) -> object:
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert doctor.main([]) == 4
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("torch cannot be imported (No module named 'torch'); install it")
