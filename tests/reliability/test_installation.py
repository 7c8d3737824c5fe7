"""The package works where there is no compiler, no triton, no OpenVINO and no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
import tiny
from figures import Figure
from test_no_network import BLOCK, without_interfaces

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE")

# What a bare machine lacks; None in sys.modules makes an import fail as a missing package does.
LACKING = ("triton", "openvino", "nncf", "tensorboard", "huggingface_hub", "transformers")
HIDE = f"""
import sys
import network_block

network_block.install()
sys.modules.update(dict.fromkeys({LACKING!r}))
"""

GENERATE = """
import json, shutil, sys
import dlmone_fast
from dlmone_fast.kernels import native

assert shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("cc") is None
model = dlmone_fast.load(sys.argv[1])
texts = model.generate(json.loads(sys.argv[2]))
report = {"file": dlmone_fast.__file__, "backend": model.backend, "texts": texts}
print(json.dumps(report | {"native": native.is_available()}))
"""


def environment(folder: Path, *paths: Path) -> dict[str, str]:
    """Without programs to find, and without a network."""
    empty = folder / "bin"
    empty.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH")}
    return {
        **kept, "PATH": str(empty), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "NETWORK_ATTEMPTS": str(folder / "attempts"),
    }  # fmt: skip


def generate(
    python: Path | str, folder: Path, variables: dict[str, str]
) -> tuple[dict[str, object], float, int]:
    """What a fresh process generates, the seconds it takes, and the warnings it prints."""
    model, prompts = tiny.save(folder / "model"), tiny.prompts(5)
    started = time.monotonic()
    done = subprocess.run(
        [*without_interfaces(), str(python), "-W", "default", "-c", GENERATE, str(model),
         json.dumps(prompts)],
        capture_output=True, text=True, env=variables, cwd=folder, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert not (folder / "attempts").exists()
    report = json.loads(done.stdout.splitlines()[-1])
    expected = tiny.generator(backend="eager").generate(prompts)
    assert report["texts"] == expected
    assert report["backend"] == "eager"
    return report, seconds, warnings_in(done.stderr)


def warnings_in(text: str) -> int:
    """Lines that say so, in any case; one that Python quotes of a source is the same warning."""
    lines = (line.lower() for line in text.splitlines())
    return sum("warning" in line and "warnings.warn" not in line for line in lines)


def test_a_bare_machine_generates(tmp_path: Path) -> None:
    """The sources as they are, with all of that hidden; what is built of C++ may be there."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDE)
    variables = environment(tmp_path, hidden, BLOCK, ROOT)
    _, _, warnings = generate(sys.executable, tmp_path, variables)
    assert warnings <= 1


def test_an_installation_without_a_compiler(campaign: bool, figure: Figure, tmp_path: Path) -> None:
    """From the sources to text: a wheel, an environment of its own, a model."""
    if not campaign:
        pytest.skip("builds a wheel: --campaign")
    wheel, said = build_wheel(tmp_path)
    python = fresh_environment(tmp_path / "env", wheel)
    variables = environment(tmp_path)
    report, seconds, warnings = generate(python, tmp_path, variables)
    assert Path(str(report["file"])).is_relative_to(tmp_path / "env")
    assert report["native"] is False
    assert seconds < SECONDS
    assert warnings <= 1
    doctor = subprocess.run(
        [str(python), "-m", "dlmone_fast.doctor"],
        capture_output=True, text=True, env=variables, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "no C++ compiler" in doctor.stdout
    figure(
        "R22", "wheel built without compiler and network, installed with --no-deps beside the "
        "libraries it needs; triton, which it requires on Linux, and OpenVINO hidden",
        f"imports and generates in under {SECONDS} s, at most 1 warning",
        f"{seconds:.1f} s, {warnings} warnings; the build said: {said}",
    )  # fmt: skip


def pip(folder: Path, *arguments: str) -> str:
    """What pip prints, without compiler and network. It may look for the latter."""
    own = folder / "pip"
    own.mkdir(exist_ok=True)
    done = subprocess.run(
        [*without_interfaces(), sys.executable, "-m", "pip", "--disable-pip-version-check",
         *arguments, "--no-deps", "--no-index"],
        capture_output=True, text=True, env=environment(own, BLOCK), cwd=own, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def build_wheel(folder: Path) -> tuple[Path, str]:
    """A wheel of the sources, and the one line that a build without a compiler prints."""
    sources, wheels = folder / "sources", folder / "wheels"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_native_build.txt", "*.egg-info")
    for name in ("dlmone_fast", "csrc"):
        shutil.copytree(ROOT / name, sources / name, ignore=unwanted)
    for name in SOURCES:
        shutil.copy(ROOT / name, sources)
    where = ("--wheel-dir", str(wheels))
    output = pip(folder, "-v", "wheel", str(sources), "--no-build-isolation", *where)
    lines = [line.strip() for line in output.splitlines()]
    said = {line for line in lines if line.endswith("the torch implementations serve instead")}
    assert len(said) == 1, lines
    (wheel,) = wheels.glob("*.whl")
    return wheel, said.pop()


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """A Python environment with the wheel, and the libraries that are installed here."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip(folder.parent, "--python", str(python), "install", str(wheel))
    (site,) = folder.glob("lib/python*/site-packages")
    # Behind the wheel in the path, and without the .pth files of an editable installation.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.copy(BLOCK / "network_block.py", site)
    # Not as sitecustomize: a system may have one of its own, which would come first.
    (site / "hidden_libraries.py").write_text(HIDE)
    (site / "hidden_libraries.pth").write_text("import hidden_libraries\n")
    return python
