"""The compiled network; one small shape only, as compiling takes its time."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tiny_training import tiny_config

from dlmone_fast.errors import BackendUnavailableError
from dlmone_fast.runtime.engines import choose, compiled, make_engine
from dlmone_fast.training.workspace import open_workspace


def test_a_compiled_network_is_the_denoiser(monkeypatch: pytest.MonkeyPatch):
    denoiser = tiny.denoiser(num_layers=1)
    request = choose.EngineRequest(denoiser, "fp32")
    reason = choose.why_unavailable("compile", request)
    if reason:
        pytest.skip(reason)
    engine = make_engine("compile", request)
    assert isinstance(engine, compiled.CompileEngine)
    runner = engine.runner()
    for rows in (3, 4, 1):
        x_t, t = torch.randn(rows, 20, 16), torch.full((rows,), 30)
        with torch.inference_mode():
            # A batch of one runs in the same bucket here: one compilation is enough.
            monkeypatch.setattr(compiled, "bucket_of", lambda rows: 4)
            found, expected = runner.predict(x_t, t), denoiser(x_t, t)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(engine._compiled) == 1


def test_more_shapes_than_torch_counts(monkeypatch: pytest.MonkeyPatch):
    # torch gives up on a code object after eight compilations.
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: plain(f, **{**o, "backend": "eager",
                                                                     "mode": None}))  # fmt: skip
    denoiser = tiny.denoiser(num_layers=1, hidden_size=8, ffn_size=8)
    runner = compiled.CompileEngine(denoiser, "fp32").runner()
    for length in range(1, 13):
        x_t, t = torch.randn(2, length, 16), torch.full((2,), 30)
        with torch.inference_mode():
            found, expected = runner.predict(x_t, t), denoiser(x_t, t)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert "C++ compiler" in str(compiled.why_not_compile(torch.device("cpu")))
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert "triton" in str(compiled.why_not_compile(torch.device("cuda")))
    int8 = choose.EngineRequest(tiny.denoiser(), "int8")
    assert "int8" in str(choose.why_unavailable("compile", int8))


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(compiled, "_why_no_compiler", lambda device: None)
    expected = r"file/cache, which cannot be written.*set TORCHINDUCTOR_CACHE_DIR"
    with pytest.raises(BackendUnavailableError, match=expected):
        make_engine("compile", choose.EngineRequest(tiny.denoiser(), "fp32"))
    config = tiny_config(tmp_path / "run", compile=True)
    with pytest.raises(BackendUnavailableError, match=expected):
        open_workspace(config)
