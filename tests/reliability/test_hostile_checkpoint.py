"""Hostile .pt files given to the importer's command: nothing runs, memory stays bounded."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import Figure

from dlmone_fast import import_diffuseq
from dlmone_fast.cli import run_command

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "diffuseq-tiny"
FILE = "ema_0.9999_050000.pt"
# Beside twice the file: what Python and torch allocate anyway.
SPARE_BYTES = 96 << 20


class Runs:
    """Unpickles to a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _payloads(mark: Path) -> dict[str, Runs]:
    """Ways of creating the file `mark` while unpickling."""
    code = f"open({str(mark)!r}, 'w').close()"
    return {
        "os.system": Runs(os.system, f"touch {mark}"),
        "exec": Runs(exec, code),
        "eval": Runs(eval, code),
        "subprocess": Runs(subprocess.check_call, ["touch", str(mark)]),
        "shutil": Runs(shutil.copy, __file__, str(mark)),
    }


def _archive(path: Path, records: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def _text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def _number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _pickle(value: bytes) -> bytes:
    """A dict with one entry, whose value the opcodes leave on the stack."""
    return b"\x80\x02}" + _text("lm_head.weight") + value + b"s."


def _tensor(numel: int, shape: int, stride: int, offset: int = 0) -> bytes:
    """A tensor over record 0, with claims about it."""
    storage = b"(" + _text("storage") + _name("torch", "FloatStorage") + _text("0")
    storage += _text("cpu") + _number(numel) + b"tQ"
    sizes = _number(shape) + b"\x85" + _number(stride) + b"\x85"
    hooks = _name("collections", "OrderedDict") + b")R"
    call = _name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + _number(offset)
    return _pickle(call + sizes + b"\x89" + hooks + b"tR")


def _with_data(content: bytes) -> dict[str, bytes]:
    return {"a/data.pkl": content, "a/version": b"3\n", "a/data/0": bytes(64)}


def _overlapping(path: Path) -> None:
    """Many records over the same bytes, after the way of zip bombs that need no recursion."""
    _archive(path, {f"a/data/{i}": bytes(100) for i in range(3)} | {"a/data/3": bytes(1 << 20)})
    content = bytearray(path.read_bytes())
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
    last = content[entries[-1] :][:46]
    for entry in entries[:-1]:
        # Sizes and checksum of the big record, and its place.
        content[entry + 16 : entry + 28] = last[16:28]
        content[entry + 42 : entry + 46] = last[42:46]
    path.write_bytes(content)


def _shared_tuples(depth: int) -> bytes:
    """A key whose hash takes 2^depth steps."""
    levels = b")q\x00"
    for i in range(depth):
        levels += b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1])
    return b"\x80\x02}" + levels + b"K\x01s."


@dataclass(frozen=True)
class Hostile:
    """A kind of file: how it is written, and what the refusal must say."""

    write: Callable[[Path, Path], None]
    says: str
    environment: tuple[str, ...] = ()


def _saved(payload: str, *, inside: bool = False, zipped: bool = True) -> Hostile:
    def write(path: Path, mark: Path) -> None:
        value: Any = _payloads(mark)[payload]
        value = {"lm_head.bias": torch.zeros(3), "lm_head.weight": value} if inside else value
        torch.save(value, path, _use_new_zipfile_serialization=zipped)

    return Hostile(write, "its pickle asks for" if zipped else "is not a complete file")


def _bare(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(_payloads(mark)["os.system"]))


def _other_case(path: Path, mark: Path) -> None:
    _archive(path, {"a/DATA.PKL": pickle.dumps(_payloads(mark)["exec"], 2), "a/version": b"3\n"})


def _script(path: Path, mark: Path) -> None:
    records = _with_data(_tensor(16, 16, 1))
    _archive(path, records | {"a/constants.pkl": b"\x80\x02).", "a/code/x.py": b"import os\n"})


def _raw(content: bytes, says: str) -> Hostile:
    return Hostile(lambda path, mark: _archive(path, _with_data(content)), says)


def _bomb(path: Path, mark: Path) -> None:
    _archive(
        path, _with_data(_tensor(1, 1, 1)) | {"a/data/1": bytes(1 << 28)}, zipfile.ZIP_DEFLATED
    )


def _huge(path: Path, mark: Path) -> None:
    path.touch()
    os.truncate(path, 5 << 30)


def _long_pickle(path: Path, mark: Path) -> None:
    _archive(path, _with_data(b"\x80\x02" + b"}0" * (16 << 20) + b"}."))


FORCED = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",)
HOSTILE: dict[str, Hostile] = {
    **{f"{name} as the whole": _saved(name) for name in _payloads(Path())},
    "os.system inside a state dict": _saved("os.system", inside=True),
    "os.system, legacy container": _saved("os.system", zipped=False),
    "os.system, bare pickle": Hostile(_bare, "is not a complete file"),
    "exec, record in capitals": Hostile(_other_case, "asks for"),
    "bait: torch told to load everything": Hostile(_saved("exec").write, "asks for", FORCED),
    "bait: bare pickle, torch told so": Hostile(_bare, "is not a complete file", FORCED),
    "TorchScript": Hostile(_script, "safe loader refused"),
    "bytearray of 8 TB": _raw(_pickle(_name("builtins", "bytearray") + _number(1 << 43) + b"\x85R"),
                              "asks for 'builtins.bytearray'"),
    "uninitialised tensor of 2 GB": _raw(
        _pickle(_name("torch", "FloatTensor") + _number(1 << 29) + b"\x85R"),
        "asks for 'torch.FloatTensor'",
    ),
    "storage larger than its record": _raw(_tensor(1 << 40, 1 << 40, 1), "safe loader refused"),
    "tensor of one element repeated": _raw(_tensor(16, 1 << 40, 0), "is not a plain tensor"),
    "tensor beyond its storage": _raw(_tensor(16, 16, 1, 1 << 40), "safe loader refused"),
    "key that takes forever to hash": _raw(_shared_tuples(60), "repeats a tuple"),
    "zip bomb, deflated": Hostile(_bomb, "compressed or overlapping"),
    "zip bomb, overlapping records": Hostile(lambda p, m: _overlapping(p), "overlap"),
    "pickle of 32 MB": Hostile(_long_pickle, "too large for a state dict"),
    "5 GB of nothing": Hostile(_huge, "more than the limit"),
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    errors: str
    peak_bytes: int


def _in_a_fork(arguments: list[str], variables: dict[str, str]) -> Ended:
    """The command in a forked child, for its memory and without the seconds that torch takes."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.environ.update(variables)
            os.dup2(write, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), write_through=True)
            sys.stdout = sys.stderr
            run_command(lambda: import_diffuseq.main(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        errors = stream.read().decode()
    _, status, usage = os.wait4(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), errors, usage.ru_maxrss * 1024)


def _as_a_command(arguments: list[str], variables: dict[str, str]) -> Ended:
    process = subprocess.Popen(
        [sys.executable, "-m", "dlmone_fast.import_diffuseq", *arguments],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    process.stderr.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(process.returncode, errors, usage.ru_maxrss * 1024)


def _source(folder: Path) -> Path:
    folder.mkdir()
    for name in (FILE, "training_args.json"):
        shutil.copy(TINY / name, folder)
    return folder


@pytest.mark.parametrize("how", ["fork", "command"])
def test_a_hostile_checkpoint_runs_nothing_and_costs_nothing(
    how: str, campaign: bool, figure: Figure, tmp_path: Path
) -> None:
    run = _in_a_fork if how == "fork" else _as_a_command
    whole = campaign or how == "fork"
    kinds = HOSTILE if whole else {k: HOSTILE[k] for k in ("bait: torch told to load everything",)}
    good = run([str(_source(tmp_path / "good")), str(tmp_path / "out")], {})
    assert good.code == 0, good.errors
    worst = 0
    for index, (kind, hostile) in enumerate(kinds.items()):
        folder, mark = _source(tmp_path / str(index)), tmp_path / f"mark-{index}"
        file = folder / FILE
        hostile.write(file, mark)
        out = tmp_path / f"out-{index}"
        variables = dict.fromkeys(hostile.environment, "1")
        ended = run([str(folder), str(out)], variables)
        assert not mark.exists(), kind
        assert not out.exists(), kind
        assert ended.code == 4, (kind, ended.errors)
        assert ended.errors.startswith(f"error: {file}: "), (kind, ended.errors)
        assert hostile.says in ended.errors, (kind, ended.errors)
        # One line, which does not name a way around the restriction.
        assert ended.errors.count("\n") == 1, (kind, ended.errors)
        assert "weights_only" not in ended.errors
        more = ended.peak_bytes - good.peak_bytes
        allowed = SPARE_BYTES + 2 * file.stat().st_blocks * 512
        assert more < allowed, f"{kind}: {more:,} bytes more than a good file needs"
        worst = max(worst, more)
        shutil.rmtree(folder)
    figure(
        "R25", f"hostile .pt files given to the importer ({how})",
        "0 executions, exit code 4, memory within twice the file",
        f"0 executions of {len(kinds)} kinds, exit code 4 each, at most {worst / 1e6:.0f} MB above "
        "a good file's",
    )  # fmt: skip


def test_the_payloads_do_run_where_nothing_stops_them(tmp_path: Path) -> None:
    """What the test above would see if a payload ran."""
    for name in _payloads(Path()):
        mark = tmp_path / name
        torch.save(_payloads(mark)[name], tmp_path / "x.pt")
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert mark.exists(), name
