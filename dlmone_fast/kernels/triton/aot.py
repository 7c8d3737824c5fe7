"""Compiles every shipped Triton kernel without a GPU and reports what it uses of one.

    python -m dlmone_fast.kernels.triton.aot --arch 80 90

Prints registers, spilled bytes and shared memory for each kernel and configuration; exits with 1
if anything spills or does not compile. Runs in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlmone_fast.kernels.triton.support import Build

ARCHITECTURES = (80, 90)
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


def shipped_builds() -> Iterator[Build]:
    """The `SHIPPED` configurations of every module in this package."""
    package = importlib.import_module(__package__ or "dlmone_fast.kernels.triton")
    for info in pkgutil.iter_modules(package.__path__):
        # This file runs as __main__ as well; importing it again would only warn.
        if info.name != "aot":
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            yield from getattr(module, "SHIPPED", ())


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
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _describe(build: Build) -> str:
    types = [kind for kind in build.signature.values() if kind.startswith("*")]
    constants = [f"{name}={value}" for name, value in build.constants.items()]
    return " ".join([*types, *constants, f"warps={build.num_warps}", f"stages={build.num_stages}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile everything; 1 if something spilled or failed."""
    parser = argparse.ArgumentParser(prog="python -m dlmone_fast.kernels.triton.aot",
                                     description=(__doc__ or "").splitlines()[0])  # fmt: skip
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES),
                        help="compute capabilities without the dot (default: 80 90)")  # fmt: skip
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    bad = 0
    for build in shipped_builds():
        if options.kernel not in build.kernel.__name__:
            continue
        for arch in options.arch:
            usage = compile_build(build, arch)
            bad += bool(usage.spill_stores or usage.spill_loads)
            print(json.dumps(asdict(usage)) if options.json else _line(usage), flush=True)
    if bad:
        print(f"{bad} configuration(s) spill registers", file=sys.stderr)
    return 1 if bad else 0


def _line(usage: Usage) -> str:
    spilled = usage.spill_stores + usage.spill_loads
    return (
        f"sm_{usage.arch} {usage.kernel}: {usage.registers} registers, {spilled} B spilled, "
        f"{usage.shared} B shared, {' '.join(usage.instructions) or 'no tensor-core instruction'}"
        f"  [{usage.configuration}]"
    )


if __name__ == "__main__":
    raise SystemExit(main())
