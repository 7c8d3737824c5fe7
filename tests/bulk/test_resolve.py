"""What a job's options come to, and that a slip is found before the output folder is made."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from dlmone_fast.bulk.job import Options
from dlmone_fast.bulk.resolve import resolved
from dlmone_fast.errors import (
    EXIT_MODEL,
    BackendUnavailableError,
    DlmOneError,
    ModelFileError,
    UsageError,
)
from dlmone_fast.runtime import load_model


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("resolve") / "student")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("resolve") / "teacher", kind="teacher")


def named(model: Path, device: str, dtype: str = "auto", backend: str = "auto") -> tuple[str, ...]:
    options = resolved(Options(str(model)), device, dtype, backend, here=device == "cpu")
    return options.device, options.dtype, options.backend


def test_auto_is_what_a_worker_would_take(student: Path):
    loaded = load_model(student, "cpu")
    assert named(student, "cpu") == ("cpu", loaded.precision, loaded.backend)
    # Known without a GPU: the machine that starts a job on a cluster may have none.
    assert named(student, "cuda") == ("cuda", "bf16", "eager")
    assert named(student, "cuda", "fp16", "graph") == ("cuda", "fp16", "graph")


def test_auto_follows_what_is_installed(student: Path, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "openvino" else find(name)
    )
    assert named(student, "cpu") == ("cpu", "fp32", "eager")
    with pytest.raises(BackendUnavailableError, match=r"--backend openvino: .*use --backend auto"):
        named(student, "cpu", backend="openvino")
    # The workers of a cluster may have it.
    options = resolved(Options(str(student)), "cpu", "auto", "openvino", here=False)
    assert options.backend == "openvino"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_candidates": 0}, "num_candidates must be a whole number from 1 to 64, got 0"),
        ({"num_candidates": 65}, "num_candidates must be a whole number from 1 to 64, got 65"),
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"steps": 31}, "steps must be between 1 and t_init (30), got 31"),
        ({"sampler": "ddim"}, "need a teacher"),
        ({"temperature": 11.0}, "temperature must be a number from 0 to 10, got 11.0"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 to 10, got nan"),
    ],
)
def test_options_that_the_model_refuses(student: Path, options: dict[str, Any], said: str):
    with pytest.raises(UsageError, match=re.escape(said)):
        resolved(Options(str(student), **options), "cpu", "auto", "auto", here=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": "dddim"}, "sampler must be one of"),
        ({"steps": 41}, "steps must be between 1 and 40, got 41"),
        ({"sampler": "ancestral"}, "use ddim, dpm-solver++ or q-sampling for fewer"),
    ],
)
def test_options_that_a_teacher_refuses(teacher: Path, options: dict[str, Any], said: str):
    with pytest.raises(UsageError, match=re.escape(said)):
        resolved(Options(str(teacher), **options), "cpu", "auto", "auto", here=True)


@pytest.mark.parametrize(
    ("dtype", "backend", "said"),
    [
        ("fp23", "auto", "dtype must be one of"),
        ("int8", "auto", "int8 is calibrated on prompts"),
        ("auto", "eagre", "backend must be one of auto, eager"),
        ("auto", "graph", "--backend graph: cannot run this model on this machine"),
    ],
)
def test_names_that_are_none(student: Path, dtype: str, backend: str, said: str):
    with pytest.raises(DlmOneError, match=said):
        named(student, "cpu", dtype, backend)


def test_a_model_without_a_tokenizer_or_with_a_damaged_file_is_refused(tmp_path: Path):
    mute = tiny.save(tmp_path / "mute", with_tokenizer=False)
    with pytest.raises(ModelFileError, match=r"no tokenizer\.json"):
        named(mute, "cpu")
    damaged = tiny.save(tmp_path / "damaged")
    with (damaged / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelFileError, match=r"model\.safetensors: has") as caught:
        named(damaged, "cpu")
    assert caught.value.exit_code == EXIT_MODEL
