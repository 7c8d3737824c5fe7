"""Compiles every shipped Triton kernel without a GPU and reports what it uses of one.

    python -m dlmone_fast.kernels.triton.aot --arch 80 90

Prints registers, spilled bytes and shared memory for each kernel and configuration; exits with 1
if anything spills, does not compile, or is launched in no configuration that is listed. Runs in a
process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from dlmone_fast.cli import run_command
from dlmone_fast.kernels.dispatch import OPERATIONS
from dlmone_fast.kernels.triton.support import Build

ARCHITECTURES = (80, 90)
_MANY_REGISTERS = 96
_INSTRUCTIONS = re.compile(r"wgmma\.mma_async|mma\.sync|cp\.async\.bulk|cp\.async|ldmatrix")


@dataclass(frozen=True)
class Usage:
    """Resources of one compiled kernel; bytes for spills and shared memory."""

    kernel: str
    configuration: str
    arch: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    instructions: tuple[str, ...]


@cache
def kernel_modules(names: tuple[str, ...] = ()) -> tuple[ModuleType, ...]:
    """The modules that hold kernels, `kernels/<operation>/triton.py`, or those with the names."""
    operations = names or [f"dlmone_fast.kernels.{name}.triton" for name in OPERATIONS]
    return tuple(importlib.import_module(name) for name in operations)


def shipped_builds(modules: Sequence[ModuleType]) -> Iterator[Build]:
    """The `SHIPPED` configurations of the modules."""
    for module in modules:
        yield from getattr(module, "SHIPPED", ())


def unshipped_kernels(modules: Sequence[ModuleType]) -> list[str]:
    """Kernels that the modules launch and `SHIPPED` leaves out: nothing would check them.

    A kernel is a @triton.jit function named `..._kernel`, or one that its module launches as
    `name[grid](...)`; the others are called by kernels.
    """
    shipped = {build.kernel.__name__ for build in shipped_builds(modules)}
    launched = [
        f"{module.__name__}.{name}"
        for module in modules
        for name in _entry_points(module)
        if name not in shipped
    ]
    return sorted(launched)


def _entry_points(module: ModuleType) -> set[str]:
    from triton.runtime import JITFunction

    compiled = {name for name, value in vars(module).items() if isinstance(value, JITFunction)}
    calls = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.Call)]
    grids = [call.func.value for call in calls if isinstance(call.func, ast.Subscript)]
    launched = {grid.id for grid in grids if isinstance(grid, ast.Name)}
    return {name for name in compiled if name in launched or name.endswith("_kernel")}


def compile_build(build: Build, arch: int) -> Usage:
    """Compile one configuration for a compute capability (80, 90, …)."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = triton.compiler.ASTSource(
        fn=build.kernel,
        signature=_full_signature(build),
        constexprs=dict(build.constants),
        attrs=_alignment(build),
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, **build.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = _assemble(compiled.asm["ptx"], arch)
    return Usage(
        kernel=build.kernel.__name__,
        configuration=_describe(build),
        arch=arch,
        registers=_number(r"Used (\d+) registers", report),
        spill_stores=_number(r"(\d+) bytes spill stores", report),
        spill_loads=_number(r"(\d+) bytes spill loads", report),
        shared=compiled.metadata.shared,
        instructions=tuple(sorted(set(_INSTRUCTIONS.findall(compiled.asm["ptx"])))),
    )


def _full_signature(build: Build) -> dict[str, str]:
    names: Sequence[str] = build.kernel.arg_names
    given = {*build.signature, *build.constants}
    if given != set(names):
        raise ValueError(
            f"{build.kernel.__name__}: the build names {sorted(given)}, "
            f"the kernel takes {sorted(names)}"
        )
    return {n: "constexpr" if n in build.constants else build.signature[n] for n in names}


def _alignment(build: Build) -> dict[tuple[int], list[list[Any]]]:
    # What the launcher finds out by itself: without it ptxas reports spills that do not happen.
    aligned = [
        index
        for index, name in enumerate(build.kernel.arg_names)
        if name in build.multiples_of_16 or build.signature.get(name, "").startswith("*")
    ]
    return {(index,): [["tt.divisibility", 16]] for index in aligned}


def _assemble(ptx: str, arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    name = f"sm_{arch}" + ("a" if arch >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", str(source)]
        command += ["-o", str(Path(folder) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def _describe(build: Build) -> str:
    types = [kind for kind in build.signature.values() if kind.startswith("*")]
    constants = [f"{name}={value}" for name, value in build.constants.items()]
    return " ".join([*types, *constants, f"warps={build.num_warps}", f"stages={build.num_stages}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile everything; 1 if something spilled, failed or is not listed."""
    parser = argparse.ArgumentParser(prog="python -m dlmone_fast.kernels.triton.aot",
                                     description=(__doc__ or "").splitlines()[0])  # fmt: skip
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES),
                        help="compute capabilities without the dot (default: 80 90)")  # fmt: skip
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--quick", action="store_true",
                        help="no fp16, and small kernels once on older architectures")  # fmt: skip
    parser.add_argument("--modules", nargs="+", default=[], metavar="NAME",
                        help="modules to check (default: those of every operation)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    names = tuple(options.modules)
    problems = [f"{name} is in no SHIPPED" for name in unshipped_kernels(kernel_modules(names))]
    numbers = [
        number
        for number, build in enumerate(shipped_builds(kernel_modules(names)))
        if options.kernel in build.kernel.__name__
        and not (options.quick and "*fp16" in build.signature.values())
    ]
    newest, *older = sorted(options.arch, reverse=True)
    usages = _compile_all([(names, number, newest) for number in numbers], options.jobs)
    if options.quick:
        numbers = _representative(numbers, usages)
    tasks = [(names, number, arch) for arch in older for number in numbers]
    for usage in usages + _compile_all(tasks, options.jobs):
        if isinstance(usage, str):
            problems.append(usage)
            continue
        if usage.spill_stores or usage.spill_loads:
            problems.append(f"{usage.kernel} spills registers on sm_{usage.arch}")
        print(json.dumps(asdict(usage)) if options.json else _line(usage), flush=True)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


_Task = tuple[tuple[str, ...], int, int]


def _representative(numbers: list[int], usages: Sequence[Usage | str]) -> list[int]:
    """What an older architecture could still fail on: one of each kernel, and all of those that
    use tensor cores, whose instructions differ, or many of the 255 registers.
    """
    kept, seen = [], set()
    for number, usage in zip(numbers, usages, strict=True):
        if isinstance(usage, str):
            continue
        if usage.kernel not in seen or usage.instructions or usage.registers > _MANY_REGISTERS:
            kept.append(number)
            seen.add(usage.kernel)
    return kept


def _compile_all(tasks: list[_Task], jobs: int) -> list[Usage | str]:
    if jobs == 1 or not tasks:
        return [_compile_task(task) for task in tasks]
    # Not forked: a copy of a process that runs threads may hang.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compile_task, tasks))


def _compile_task(task: _Task) -> Usage | str:
    # A kernel cannot be handed to another process; its place in the listing can.
    names, number, arch = task
    build = list(shipped_builds(kernel_modules(names)))[number]
    try:
        return compile_build(build, arch)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return f"{build.kernel.__name__} on sm_{arch} [{_describe(build)}]: {reason}"


def _line(usage: Usage) -> str:
    spilled = usage.spill_stores + usage.spill_loads
    return (
        f"sm_{usage.arch} {usage.kernel}: {usage.registers} registers, {spilled} B spilled, "
        f"{usage.shared} B shared, {' '.join(usage.instructions) or 'no tensor-core instruction'}"
        f"  [{usage.configuration}]"
    )


if __name__ == "__main__":
    run_command(main)
