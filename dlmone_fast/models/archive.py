"""What a .pt file may be before torch sees it: a plain archive whose pickle names tensors alone.

torch's restricted unpickler runs no code, but it calls types that allocate: a pickle of 60 bytes
may ask for terabytes of `bytearray`, or get a tensor of uninitialised memory from
`torch.FloatTensor`. A state dict needs neither. Standard library only.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path

from dlmone_fast.errors import ModelFileError
from dlmone_fast.models.plainfiles import unreadable

# Some thousand tensors; 12 layers take 30 kB.
_MAX_PICKLE_BYTES = 2 << 20

# What torch.save names in a state dict of tensors and parameters.
_STORAGE = re.compile(r"torch [A-Z][A-Za-z0-9]{1,20}Storage")
_NAMES = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
    }
)
_AGAIN = "not opened: save the state dict again with torch.save"
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})


def check_archive(file: Path, max_bytes: int) -> None:
    """Refuse what could cost more than the file's size, or is damaged, before torch sees it.

    Raises:
        ModelFileError: the file is too large, no archive of uncompressed and undamaged records,
            or its pickle names something else than tensors.
    """
    try:
        size = file.stat().st_size
    except OSError as reason:
        raise ModelFileError(unreadable(file, reason)) from reason
    if size > max_bytes:
        raise ModelFileError(
            f"{file}: has {size:,} bytes, more than the limit of {max_bytes:,}; a DiffuSeq model "
            "has about 381 million"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            problem = _archive_problem(archive, size)
    # zipfile raises several types on damaged archives.
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as reason:
        raise ModelFileError(
            f"{file}: is not a complete file of torch.save in torch 1.6 or newer ({reason}); copy "
            "it again from its source"
        ) from reason
    if problem:
        raise ModelFileError(f"{file}: {problem}")


def _archive_problem(archive: zipfile.ZipFile, size: int) -> str | None:
    entries = archive.infolist()
    stored = all(
        entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        for entry in entries
    )
    if not stored or sum(entry.file_size for entry in entries) > size:
        return (
            "has compressed or overlapping records, which torch.save never writes, and may unpack "
            f"to any size; {_AGAIN}"
        )
    # torch's archive reader finds records whatever the case of their names.
    names = {entry.filename.lower() for entry in entries}
    if len(names) != len(entries):
        return f"has two records of one name, which torch.save never writes; {_AGAIN}"
    pickles = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
    total = sum(entry.file_size for entry in pickles)
    if total > _MAX_PICKLE_BYTES:
        return f"its pickle of {total:,} bytes is too large for a state dict; {_AGAIN}"
    # torch.load does not look at the checksums of the records.
    damaged = archive.testzip()
    if damaged:
        return f"the record {damaged} is damaged; copy the file again from its source"
    for entry in pickles:
        problem = pickle_problem(archive.read(entry))
        if problem:
            return (
                f"{problem}; only state dicts of tensors are imported, never code: save one alone "
                "with torch.save"
            )
    return None


def pickle_problem(content: bytes) -> str | None:
    """Say what a pickle holds that no state dict of tensors needs; None: nothing.

    Reads the opcodes and runs none.
    """
    last, tuples = "", set()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                return f"its pickle uses {opcode.name}, which torch.save never writes"
            if opcode.name == "GLOBAL" and not _allowed(str(argument)):
                return f"its pickle asks for {str(argument).replace(' ', '.')!r:.80}"
            if opcode.name in ("BINPUT", "LONG_BINPUT") and last in _TUPLES:
                tuples.add(argument)
            # Tuples of the same tuple, 40 deep, cost nothing to write and hours to hash.
            if opcode.name in ("BINGET", "LONG_BINGET") and argument in tuples:
                return "its pickle repeats a tuple, which torch.save never does"
            last = opcode.name
    except ValueError as reason:
        return f"its pickle is damaged ({reason!s:.80})"
    return None


def _allowed(name: str) -> bool:
    return name in _NAMES or _STORAGE.fullmatch(name) is not None
