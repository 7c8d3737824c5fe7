"""The build files agree with the tree, and the package works without its native extension."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import dlmone_fast
from dlmone_fast.kernels import native

ROOT = Path(__file__).resolve().parent.parent


def test_every_native_source_is_matched_by_a_cmake_glob():
    globs = re.findall(r"csrc/\S*\*\.\w+", (ROOT / "CMakeLists.txt").read_text())
    built = {path for pattern in globs for path in ROOT.glob(pattern)}
    sources = {p for suffix in ("*.cpp", "*.cu") for p in (ROOT / "csrc").rglob(suffix)}
    assert sources
    assert built == sources


def test_the_native_sources_do_not_use_torch():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_metadata_and_package_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["version"] == dlmone_fast.__version__
    # torch in the build requirements would download a second one for every isolated build.
    assert not any(r.startswith("torch") for r in project["build-system"]["requires"])
    assert resources.files("dlmone_fast").joinpath("py.typed").is_file()


def test_every_data_file_of_the_package_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    globs = project["tool"]["setuptools"]["package-data"]["dlmone_fast"]
    package = ROOT / "dlmone_fast"
    installed = {path for pattern in globs for path in package.glob(pattern)}
    not_data = {".py", ".pyc", ".so", ".pyd"}
    data = {p for p in package.rglob("*") if p.is_file() and p.suffix not in not_data}
    assert any(path.suffix == ".toml" for path in data)
    assert data <= installed


BLOCKED = """
import sys
sys.modules["dlmone_fast._C"] = None
import torch
from dlmone_fast.errors import BackendUnavailableError
from dlmone_fast.kernels import native
from dlmone_fast.kernels.nearest_token import nearest_token
assert not native.is_available()
assert native.cpu_paths() == ()
assert "no CUDA part" in native.cuda_report()
x, e = torch.eye(4)[:3], torch.eye(4)
assert nearest_token(x, e).tolist() == [0, 1, 2]
try:
    nearest_token(x, e, kernel_backend="cpp")
except BackendUnavailableError as error:
    print(error)
"""


def test_without_the_extension_torch_serves_and_forcing_it_says_why():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True
    )
    assert "'cpp' was asked for and cannot run" in done.stdout
    assert re.search(r"Available here: (triton, )?torch;", done.stdout)


def test_the_reason_is_the_one_the_build_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    note = tmp_path / "note.txt"
    note.write_text("the native extension was not built: no C++ compiler was found\n")
    monkeypatch.setattr(native, "_BUILD_NOTE", note)
    assert "no C++ compiler" in native._explain(ImportError("gone"))
    note.write_text("")
    assert "gone" in native._explain(ImportError("gone"))


@pytest.fixture
def setup_script() -> ModuleType:
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("dlmone_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_missing_tools_are_named_in_one_line(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(setup_script.BuildError, match="cmake was not found"):
        setup_script.find_tool("cmake")
    with pytest.raises(setup_script.BuildError, match="no C\\+\\+ compiler"):
        setup_script.compiler_or_error()


def test_the_first_error_of_a_build_is_what_is_reported(setup_script: ModuleType):
    cmake = "-- Looking\nCMake Error at CMakeLists.txt:9 (message):\n  nvcc is missing\n-- Done\n"
    assert setup_script.first_error(cmake) == (
        "CMake Error at CMakeLists.txt:9 (message): nvcc is missing"
    )
    compiler = "[1/2] Building\na.cpp:3:1: error: no such thing\nninja: build stopped\n"
    assert setup_script.first_error(compiler) == "a.cpp:3:1: error: no such thing"


def test_unknown_settings_are_refused(setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DLMONE_CUDA", "maybe")
    with pytest.raises(SystemExit, match="DLMONE_CUDA must be one of AUTO, ON, OFF, got 'MAYBE'"):
        setup_script.setting("DLMONE_CUDA", "AUTO", ("AUTO", "ON", "OFF"))


def test_cuda_sources_that_fail_do_not_cost_the_rest(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from setuptools import Distribution, Extension

    tried = []

    def build_library(command: object, library: Path, cuda: str) -> None:
        tried.append(cuda)
        if cuda != "OFF":
            raise setup_script.BuildError("nvcc fatal: Unsupported gpu architecture")

    monkeypatch.setattr(setup_script.CMakeBuild, "build_library", build_library)
    monkeypatch.setenv("CUDACXX", "nvcc")
    command = setup_script.CMakeBuild(Distribution())
    command.extensions = [Extension("dlmone_fast._C", sources=[])]
    command.build_lib, command.inplace = str(tmp_path), 0
    command.build_extension(command.extensions[0])
    assert tried == ["AUTO", "OFF"]
    note = tmp_path / "dlmone_fast" / "_native_build.txt"
    assert note.read_text() == (
        "the CUDA sources were not built: nvcc fatal: Unsupported gpu architecture\n"
    )
    monkeypatch.setattr(native, "_BUILD_NOTE", note)
    monkeypatch.setattr(native, "is_available", lambda: True)
    monkeypatch.setattr(native, "module", lambda: SimpleNamespace(built_with_cuda=False))
    assert "Unsupported gpu architecture" in native.cuda_report()
    monkeypatch.setenv("DLMONE_CUDA", "ON")
    with pytest.raises(SystemExit, match="Unsupported gpu architecture"):
        command.build_extension(command.extensions[0])


NATIVE_OFF = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("dlmone_setup", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from setuptools import Distribution, Extension
command = module.CMakeBuild(Distribution())
command.extensions = [Extension("dlmone_fast._C", sources=[])]
command.build_lib, command.inplace = sys.argv[2], 0
command.build_extension(command.extensions[0])
"""


def test_an_installation_without_the_extension_leaves_one_line(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", NATIVE_OFF, str(ROOT / "setup.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={"DLMONE_NATIVE": "OFF", "PATH": ""},
        check=True,
    )
    note = (tmp_path / "dlmone_fast" / "_native_build.txt").read_text()
    assert note == "the native extension was not built (DLMONE_NATIVE=OFF)\n"
    assert done.stdout.count("torch implementations serve") == 1
