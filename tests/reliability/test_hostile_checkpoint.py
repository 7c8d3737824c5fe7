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


def _another_directory(path: Path, size: int) -> None:
    """Two archives of one length: zipfile finds the second, torch's reader the first, which asks
    for memory."""
    hidden = _pickle(_name("builtins", "bytearray") + _number(size) + b"\x85R")
    shown = _pickle(_number(1)).ljust(len(hidden), b".")
    parts = []
    for content in (hidden, shown):
        _archive(path, _with_data(content))
        parts.append(path.read_bytes())
    path.write_bytes(parts[0][:-22] + parts[1])


def _another_locator(path: Path, mark: Path) -> None:
    """As before, with the records of 64 bits that torch.save writes."""
    parts = []
    for value in (1.0, 2.0):
        torch.save({"lm_head.weight": torch.full((4,), value)}, path)
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))


def _commented(path: Path, mark: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in _with_data(_tensor(16, 16, 1)).items():
            archive.writestr(name, content)
        archive.comment = b"PK"


def _behind_a_pickle(path: Path, mark: Path) -> None:
    """What begins with no record torch takes for its older format."""
    path.write_bytes(pickle.dumps(_payloads(mark)["os.system"]))
    with zipfile.ZipFile(path, "a") as archive:
        for name, content in _with_data(_tensor(16, 16, 1)).items():
            archive.writestr(name, content)


def _shared_tuples(depth: int, between: bytes = b"") -> bytes:
    """A key whose hash takes 2^depth steps; `between` stands before each number in the memo."""
    levels = _text("") + between + b"q\x00"
    for i in range(depth):
        levels += b"h" + bytes([i]) + b"\x86" + between + b"q" + bytes([i + 1])
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
# Before a tuple is put into the memo: nothing, another number, another protocol, a value that goes.
BETWEEN = {"": b"", ", put twice": b"q\xff", ", put after PROTO": b"\x80\x02", ", POP": b"K\x010"}
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
    **{f"key that takes forever to hash{how}": _raw(_shared_tuples(60, between), "repeats a tuple")
       for how, between in BETWEEN.items()},
    "directory elsewhere": Hostile(
        lambda p, m: _another_directory(p, 1 << 43), "the one directory of all of them"
    ),
    "directory of 64 bits elsewhere": Hostile(_another_locator, "the one directory"),
    "archive with a comment": Hostile(_commented, "the one directory"),
    "archive behind a bare pickle": Hostile(_behind_a_pickle, "begin with its first record"),
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
        "0 executions, exit code 4, memory at most twice the file and "
        f"{SPARE_BYTES >> 20} MiB above a good file's",
        f"0 executions of {len(kinds)} kinds, exit code 4 each, at most {worst / 1e6:.0f} MB above "
        "a good file's",
    )  # fmt: skip


@pytest.mark.parametrize("between", [b"", b"q\xff", b"\x80\x02"])
def test_torch_would_hash_the_shared_tuples(between: bytes, tmp_path: Path) -> None:
    _archive(tmp_path / "x.pt", _with_data(_shared_tuples(3, between)))
    (key,) = torch.load(tmp_path / "x.pt", weights_only=True)
    one = ("", "")
    assert key == ((one, one), (one, one))


def test_torch_would_read_the_other_directory(tmp_path: Path) -> None:
    _another_locator(tmp_path / "x.pt", tmp_path)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert loaded["lm_head.weight"].tolist() == [1.0] * 4
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.read("x/data/0") == struct.pack("<4f", *[2.0] * 4)
    _another_directory(tmp_path / "x.pt", 1000)
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {"lm_head.weight": bytearray(1000)}


def test_the_payloads_do_run_where_nothing_stops_them(tmp_path: Path) -> None:
    """What the test above would see if a payload ran."""
    for name in _payloads(Path()):
        mark = tmp_path / name
        torch.save(_payloads(mark)[name], tmp_path / "x.pt")
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert mark.exists(), name
