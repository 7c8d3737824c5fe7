"""Reading and writing the small files of a model folder or checkpoint, with bounds.

Nothing here trusts a file: it must be regular, lie inside its folder, and stay under a size cap
before any of it is parsed. Standard library only.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlmone_fast.errors import DlmOneError
from dlmone_fast.textfiles import decoded

MAX_JSON_BYTES = 16 << 20

StrPath = str | os.PathLike[str]

# Folders are flat and their names plain, so no name can point anywhere else.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")


def is_plain_name(name: object) -> bool:
    """True for a file name made of letters, digits, dots, dashes and underscores."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def regular_file(folder: Path, name: str, error: type[DlmOneError]) -> Path:
    """Return folder/name after checking that it is a regular file inside the folder.

    Raises:
        error: the name is not plain, nothing is there, it is a folder, a device or a pipe, or a
            symbolic link that leads out of the folder.
    """
    if not is_plain_name(name):
        raise error(
            f"{folder}: {name!r:.80} is not a plain file name; expected letters, digits, '.', '_' "
            "and '-'"
        )
    path = folder / name
    try:
        mode = path.stat().st_mode
        outside = path.resolve().parent != folder.resolve()
    except (OSError, RuntimeError) as reason:
        raise error(unreadable(path, reason)) from reason
    if not stat.S_ISREG(mode):
        raise error(f"{path}: expected a regular file; copy the folder again from its source")
    if outside:
        raise error(
            f"{path}: is a symbolic link that leads out of the folder; replace it by the file"
        )
    return path


def unreadable(path: Path, reason: Exception) -> str:
    """Explain why a file cannot be read."""
    if isinstance(reason, FileNotFoundError):
        return f"{path}: the file is missing; copy the folder again from its source"
    if isinstance(reason, PermissionError):
        return f"{path}: permission denied; make the file readable for this user"
    text = getattr(reason, "strerror", None) or str(reason)
    return f"{path}: cannot be read ({text}); copy the folder again from its source"


def unwritable(path: Path, reason: OSError) -> str:
    """Explain why a folder cannot be written, and the way out."""
    ways = {
        errno.ENOSPC: "free some space on that disk or choose another folder",
        errno.EDQUOT: "free some of the disk quota or choose another folder",
        errno.EFBIG: "raise the file size limit (ulimit -f) or choose another file system",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: "choose a folder that this user can write to",
        errno.EPERM: "choose a folder that this user can write to",
        errno.ENOTDIR: "a part of the path is a file: choose another folder",
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    way = ways.get(reason.errno or 0, "check the disk or choose another folder")
    text = reason.strerror or str(reason)
    return f"{path}: cannot be written ({text}); {way}; the previous files are intact"


def read_bytes(folder: Path, name: str, error: type[DlmOneError], limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes."""
    path = regular_file(folder, name, error)
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as reason:
        raise error(unreadable(path, reason)) from reason
    if len(content) > limit:
        raise error(
            f"{path}: is larger than the {limit:,} bytes that such a file may have; copy it again"
        )
    return content


def read_json(
    folder: Path, name: str, error: type[DlmOneError], limit: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a JSON object: strict UTF-8, no duplicate keys, no NaN or Infinity.

    Raises:
        error: the file cannot be read, is not JSON, or holds something else than an object.
    """
    return parse_json(read_bytes(folder, name, error, limit), folder / name, error)


def parse_json(content: bytes, where: Path, error: type[DlmOneError]) -> dict[str, Any]:
    """Parse what `read_json` would read from the file `where`."""
    try:
        value = json.loads(decoded(content), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as reason:
        raise error(
            f"{where}: is not valid JSON ({reason}); copy the file again from its source"
        ) from reason
    if not isinstance(value, dict):
        raise error(
            f"{where}: expected a JSON object, found {type(value).__name__}; copy the file again "
            "from its source"
        )
    return value


def dump_json(value: Mapping[str, Any]) -> str:
    """Serialise as this package always does: sorted keys, two spaces, one final newline.

    Raises:
        TypeError, ValueError: the value is not JSON, or holds NaN or Infinity.
    """
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: Path, value: Mapping[str, Any], error: type[DlmOneError]) -> None:
    """Write a JSON object; an error names the file when the value is not JSON."""
    try:
        text = dump_json(value)
    except (TypeError, ValueError) as reason:
        raise error(
            f"{path.name}: the value cannot be stored as JSON ({reason}); use plain finite "
            "numbers, strings, lists and dicts with string keys"
        ) from reason
    path.write_text(text, encoding="utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")
