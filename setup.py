"""Builds `dlmone_fast._C` with CMake and Ninja; everything else is in pyproject.toml.

Environment:
    DLMONE_NATIVE   AUTO (default): build, and install without the extension if that fails.
                    REQUIRED: a failed build fails the installation. OFF: do not build.
    DLMONE_CUDA     AUTO (default): CUDA sources are built where an nvcc is found that can.
                    ON: nvcc must be there. OFF: leave them out.
    DLMONE_SANITIZE ON: AddressSanitizer and UndefinedBehaviorSanitizer.

Without the extension the package works on its torch implementations. The reason is printed
and kept in `dlmone_fast/_native_build.txt`, where `python -m dlmone_fast.doctor` finds it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NOTE = "_native_build.txt"


class BuildError(Exception):
    """The extension cannot be built; the text is one line that says what is missing."""


def setting(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default).upper()
    if value not in allowed:
        raise SystemExit(f"dlmone_fast: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, then copies the one library it makes."""

    def build_extension(self, ext: Extension) -> None:
        native = setting("DLMONE_NATIVE", "AUTO", ("AUTO", "REQUIRED", "OFF"))
        cuda = setting("DLMONE_CUDA", "AUTO", ("AUTO", "ON", "OFF"))
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        # A library from an earlier build would hide that this one failed.
        library.unlink(missing_ok=True)
        reason, instead = "", "torch"
        if native == "OFF":
            reason = "the native extension was not built (DLMONE_NATIVE=OFF)"
        else:
            try:
                reason, instead = self.build_what_can_be(library, cuda), "Triton and torch"
            except BuildError as error:
                reason = f"the native extension was not built: {error}"
                if native == "REQUIRED" or cuda == "ON":
                    raise SystemExit(f"dlmone_fast: {reason}") from None
        (library.parent / NOTE).write_text(reason + "\n" if reason else "", encoding="utf-8")
        if reason:
            print(f"dlmone_fast: {reason}; the {instead} implementations serve instead")

    def build_what_can_be(self, library: Path, cuda: str) -> str:
        """Build, under AUTO without the CUDA sources if they fail; why they did, or nothing."""
        try:
            self.build_library(library, cuda)
            return ""
        except BuildError as error:
            # An nvcc that is too old, or does not take the host's compiler, must not cost the rest.
            if cuda != "AUTO" or not (os.environ.get("CUDACXX") or shutil.which("nvcc")):
                raise
            failure = str(error)
        self.build_library(library, "OFF")
        return f"the CUDA sources were not built: {failure}"

    def build_library(self, library: Path, cuda: str) -> None:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        compiler_or_error()
        folder = Path(self.build_temp).resolve() / "native"
        folder.mkdir(parents=True, exist_ok=True)
        # --fresh: a cache from an isolated build names a Ninja that no longer exists.
        configure = [cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
        configure += [f"-D{key}={value}" for key, value in self.definitions(ninja, cuda).items()]
        run(configure, "CMake could not configure")
        run([cmake, "--build", str(folder)], "the C++ build failed")
        shutil.copy2(folder / library.name, library)

    def definitions(self, ninja: str, cuda: str) -> dict[str, str]:
        import pybind11

        return {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "DLMONE_CUDA": cuda,
            "DLMONE_SANITIZE": os.environ.get("DLMONE_SANITIZE", "OFF"),
        }

    def get_outputs(self) -> list[str]:
        paths = [Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions]
        return [str(p) for lib in paths for p in (lib, lib.with_name(NOTE)) if p.exists()]

    def copy_extensions_to_source(self) -> None:
        # An in-place build without the extension has a note to copy, and an old library to drop.
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            built = Path(self.build_lib).resolve() / self.get_ext_filename(ext.name)
            target.unlink(missing_ok=True)
            for source in (built, built.with_name(NOTE)):
                if source.exists():
                    shutil.copy2(source, target.parent)


def find_tool(name: str) -> str:
    beside_python = os.path.dirname(sys.executable)
    path = shutil.which(name, path=beside_python + os.pathsep + os.environ.get("PATH", ""))
    if path is None:
        raise BuildError(f"{name} was not found (pip install {name})")
    return path


def compiler_or_error() -> None:
    candidates = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    if not any(name and shutil.which(name) for name in candidates):
        raise BuildError("no C++ compiler was found (install g++ or clang++, or set CXX)")


def run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="")
    if done.returncode:
        raise BuildError(f"{failure}: {first_error(done.stdout)}")


def first_error(output: str) -> str:
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return " ".join(lines[index : index + 2])
        if "error:" in line or "fatal error" in line:
            return line
    return lines[-1] if lines else "no output"


if __name__ == "__main__":
    setup(ext_modules=[Extension("dlmone_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
