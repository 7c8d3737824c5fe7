"""What a .pt file may be before torch sees it: a plain archive whose pickle names tensors alone.

torch's restricted unpickler runs no code, but it calls types that allocate: a pickle of 60 bytes
may ask for terabytes of `bytearray`, or get a tensor of uninitialised memory from
`torch.FloatTensor`. A state dict needs neither. Standard library only.
"""

from __future__ import annotations

import os
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

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

# The records at the end of a zip archive: the end of its directory, and before that, for sizes of
# 64 bits, another one with a locator.
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")

# What pushes a value that is no tuple, or in the case of REDUCE one that is hashed by its identity.
_NO_TUPLES = frozenset({"BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "GLOBAL", "REDUCE"})
_PUTS = frozenset({"BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"BINGET", "LONG_BINGET"})


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
        with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            problem = _archive_problem(archive, size) or _directory_problem(stream, archive)
    # zipfile raises several types on damaged archives.
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as reason:
        raise ModelFileError(
            f"{file}: is not a complete file of torch.save in torch 1.6 or newer ({reason}); copy "
            "it again from its source"
        ) from reason
    if problem:
        raise ModelFileError(f"{file}: {problem}")


def _directory_problem(stream: BinaryIO, archive: zipfile.ZipFile) -> str | None:
    """Say what would let torch's archive reader find other records than zipfile.

    One takes the directory's place from the record at the end, the other reckons it back from
    there; and torch takes a file that begins with no record for another format.
    """
    entries = archive.infolist()
    place = _directory(stream)
    alike = place == (archive.start_dir, len(entries))
    if not alike or 0 not in {entry.header_offset for entry in entries}:
        return (
            "does not begin with its first record and end with the one directory of all of them, "
            f"as what torch.save writes does; {_AGAIN}"
        )
    return None


def _directory(stream: BinaryIO) -> tuple[int, int] | None:
    """Where the directory is said to be, and how many records it has; None: not at the end."""
    end = stream.seek(0, os.SEEK_END) - _END.size
    magic, *disks, here, count, length, offset, comment = _unpacked(_END, stream, end)
    if magic != b"PK\5\6" or comment or any(disks):
        return None
    locator, disk, offset64, total_disks = _unpacked(_LOCATOR, stream, end - _LOCATOR.size)
    if locator == b"PK\6\7":
        end -= _LOCATOR.size + _END64.size
        short = [(count, 0xFFFF), (length, 0xFFFFFFFF), (offset, 0xFFFFFFFF)]
        fields = _unpacked(_END64, stream, end)
        magic, size, _, _, *disks, here, count, length, offset = fields
        whole = magic == b"PK\6\6" and size == _END64.size - 12
        if not whole or (disk, total_disks) != (0, 1) or any(disks) or offset64 != end:
            return None
        # The short record says the same, as far as its numbers go.
        long = (count, length, offset)
        if any(a not in (b, most) for (a, most), b in zip(short, long, strict=True)):
            return None
    return (offset, count) if offset + length == end and here == count else None


def _unpacked(record: struct.Struct, stream: BinaryIO, place: int) -> tuple[Any, ...]:
    """The fields of a record; those of zeros where the file has none."""
    if place < 0:
        return record.unpack(bytes(record.size))
    stream.seek(place)
    return record.unpack(stream.read(record.size))


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
    # zipfile ends a name at its first NUL, torch's archive reader looks for the whole of it.
    if any(entry.filename != entry.orig_filename for entry in entries):
        return f"has a name with NUL, which torch.save never writes; {_AGAIN}"
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
    last, safe = "", set[object]()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                return f"its pickle uses {opcode.name}, which torch.save never writes"
            if opcode.name == "GLOBAL" and not _allowed(str(argument)):
                return f"its pickle asks for {str(argument).replace(' ', '.')!r:.80}"
            # Tuples of the same tuple, 40 deep, cost nothing to write and hours to hash.
            if opcode.name in _PUTS:
                (safe.add if last in _NO_TUPLES else safe.discard)(argument)
            elif opcode.name in _GETS and argument not in safe:
                return "its pickle repeats a tuple or what may be one, which torch.save never does"
            # Two puts in a row store the same value.
            if opcode.name not in (*_PUTS, "PROTO"):
                last = opcode.name
    except ValueError as reason:
        return f"its pickle is damaged ({reason!s:.80})"
    return None


def _allowed(name: str) -> bool:
    return name in _NAMES or _STORAGE.fullmatch(name) is not None
