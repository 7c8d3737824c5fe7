"""Nothing is unpickled or executed: read off the syntax trees of the sources, by name.

The importer of DiffuSeq checkpoints alone calls torch.load, restricted to weights.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from figures import Figure

ROOT = Path(__file__).resolve().parents[2]
IMPORTER = "dlmone_fast/models/diffuseq.py"

# Modules that unpickle, or that run what they are given.
MODULES = {
    "_pickle", "cPickle", "cloudpickle", "code", "dill", "joblib", "jsonpickle", "marshal",
    "pickle", "runpy", "shelve", "torch.hub", "torch.package", "yaml",
}  # fmt: skip
# Builtins, and functions by the end of their dotted name.
BUILTINS = {"eval", "exec", "compile", "__import__"}
FUNCTIONS = {
    "torch.load", "torch.jit.load", "torch.export.load", "torch.serialization.load",
    "numpy.load", "np.load", "pandas.read_pickle", "os.system", "os.popen",
}  # fmt: skip
# What imports by a name; files that may compute it, all of them from names of this package.
IMPORTERS = ("importlib.import_module", "importlib.__import__")
COMPUTED = {
    "dlmone_fast/__init__.py", "dlmone_fast/autoregressive/__init__.py", "dlmone_fast/doctor.py",
    "dlmone_fast/kernels/native.py",
    "dlmone_fast/kernels/triton/aot.py",
}  # fmt: skip
# numpy.load unpickles only where it is told to.
HARMLESS = {"numpy.load": ("allow_pickle", False), "np.load": ("allow_pickle", False)}


def dotted(node: ast.expr, aliases: Mapping[str, str] | None = None) -> str:
    """`a.b.c` of an expression of names and attributes, as imported; empty for another one."""
    if isinstance(node, ast.Name):
        return (aliases or {}).get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value, aliases)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def aliases_of(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """What the names mean that imports bind, anywhere in a source."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound = {alias.asname or alias.name: alias.name for alias in node.names}
            found |= {name: f"{node.module}.{meant}" for name, meant in bound.items()}
    return found


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword; None if there is none."""
    for item in call.keywords:
        if item.arg == name and isinstance(item.value, ast.Constant):
            return item.value.value
    return None


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Dotted names of the modules and objects that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module or ''}.{alias.name}" for alias in node.names] + [node.module or ""]


def is_listed(name: str) -> bool:
    """Whether a dotted name is of a module that unpickles, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in MODULES)


def forbidden(source: str, computed: bool = False) -> Iterator[tuple[int, str]]:
    """Line and name of everything that unpickles or executes.

    `computed`: what is imported may be named by something else than a constant.
    """
    nodes = list(ast.walk(ast.parse(source)))
    aliases = aliases_of(nodes)
    called = {id(node.func): node for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = imported(node)
            yield from ((node.lineno, n) for n in names if is_listed(n) or n in FUNCTIONS)
        elif isinstance(node, ast.Name):
            if node.id in BUILTINS and isinstance(node.ctx, ast.Load):
                yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield from _forbidden_attribute(node, called.get(id(node)), aliases)
        elif isinstance(node, ast.Call):
            yield from _forbidden_call(node, aliases, computed)


def _forbidden_attribute(
    node: ast.Attribute, call: ast.Call | None, aliases: Mapping[str, str]
) -> Iterator[tuple[int, str]]:
    name = dotted(node, aliases)
    if (name.startswith("builtins.") and node.attr in BUILTINS) or is_listed(name):
        yield node.lineno, name
    if name in FUNCTIONS:
        argument, value = HARMLESS.get(name, ("", None))
        if call is None or not argument or keyword(call, argument) is not value:
            yield node.lineno, name


def _forbidden_call(
    node: ast.Call, aliases: Mapping[str, str], computed: bool
) -> Iterator[tuple[int, str]]:
    if keyword(node, "shell") is True:
        yield node.lineno, "shell=True"
    name = dotted(node.func, aliases)
    texts = [arg.value if isinstance(arg, ast.Constant) else None for arg in node.args[:2]]
    if name in IMPORTERS:
        meant = str(texts[0] or "") if texts else ""
        if is_listed(meant) or not (meant or computed):
            yield node.lineno, f"import_module({meant})"
    if name == "getattr" and len(texts) == 2:
        meant = f"{dotted(node.args[0], aliases)}.{texts[1]}"
        if meant in FUNCTIONS or meant.removeprefix("builtins.") in BUILTINS:
            yield node.lineno, meant


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import pickle", "pickle"),
        ("import pickle as p", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import joblib.numpy_pickle", "joblib"),
        ("from torch import hub", "torch.hub"),
        ("from torch import load", "torch.load"),
        ("x = torch.load(file)", "torch.load"),
        ("x = torch.load(file, weights_only=True)", "torch.load"),
        ("load = torch.load", "torch.load"),
        ("np.load(file)", "np.load"),
        ("np.load(file, allow_pickle=True)", "np.load"),
        ("f = np.load", "np.load"),
        ("eval('1')", "eval"),
        ("run = exec", "exec"),
        ("import builtins; builtins.eval('1')", "builtins.eval"),
        ("__import__('os')", "__import__"),
        ("from yaml import load", "yaml"),
        ("os.system('ls')", "os.system"),
        ("subprocess.run('ls', shell=True)", "shell=True"),
        ("import torch as th; th.load(f)", "torch.load"),
        ("import torch.serialization as s; s.load(f)", "torch.serialization.load"),
        ("from torch import serialization; serialization.load(f)", "torch.serialization.load"),
        ("from torch import hub as h", "torch.hub"),
        ("import torch; torch.hub.load(f)", "torch.hub"),
        ("import numpy as n; n.load(f)", "numpy.load"),
        ("import builtins as b; b.eval('1')", "builtins.eval"),
        ("import os as o; o.system('ls')", "os.system"),
        ("import torch as th; getattr(th, 'load')(f)", "torch.load"),
        ("import importlib; importlib.import_module('pickle')", "import_module(pickle"),
        ("from importlib import import_module; import_module('torch.hub')", "import_module(torch"),
        ("from importlib import import_module as i; i(name)", "import_module("),
        ("import importlib as i; i.import_module(f'pick{le}')", "import_module("),
        ("import importlib; importlib.import_module(name='pickle')", "import_module("),
    ],
)
def test_each_way_is_seen(line: str, name: str) -> None:
    found = [where for _, where in forbidden(line)]
    assert any(where.startswith(name) for where in found), found


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()", "re.compile('x')", "torch.compile(f)", "import pickletools",
        "np.load(file, mmap_mode='r', allow_pickle=False)", "json.loads(text)", "load(path)",
        "compile: bool = False",
        "import importlib; importlib.import_module('huggingface_hub')",
        "import json as torch; torch.load(f)", "getattr(model, 'load')(path)",
        "'''pickle.load(x)'''",
    ],
)  # fmt: skip
def test_what_bears_a_like_name_is_left_alone(line: str) -> None:
    assert list(forbidden(line)) == []


def test_no_source_unpickles_or_executes(figure: Figure) -> None:
    sources = [
        ROOT / "setup.py",
        *ROOT.glob("dlmone_fast/**/*.py"),
        *ROOT.glob("benchmarks/**/*.py"),
    ]
    lines, found = 0, []
    for path in sorted(sources):
        text = path.read_text(encoding="utf-8")
        lines += text.count("\n")
        where = path.relative_to(ROOT).as_posix()
        seen = forbidden(text, computed=where in COMPUTED)
        found += [f"{where}:{line}: {name}" for line, name in seen]
    assert len(sources) > 150
    outside = [where for where in found if not where.startswith(f"{IMPORTER}:")]
    assert outside == []
    assert [where.split(": ")[1] for where in found] == ["torch.load"]
    figure(
        "R24", "pickle, torch.load, eval, exec and their like outside the importer", "0",
        f"{len(outside)} in {len(sources)} files of {lines:,} lines",
    )  # fmt: skip


def test_the_importer_loads_weights_alone() -> None:
    tree = ast.parse((ROOT / IMPORTER).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (load,) = [call for call in calls if dotted(call.func) == "torch.load"]
    assert keyword(load, "weights_only") is True
    # Nothing is allowed beyond torch's own list, and no way out is named in the module.
    text = (ROOT / IMPORTER).read_text(encoding="utf-8")
    assert "safe_globals" not in text
    assert "weights_only=False" not in text
