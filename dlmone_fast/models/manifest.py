"""The manifest of a folder: size and sha256 of each file, checked before anything is read.

No common tensor format notices a flipped bit; this does. The manifest is kept in one canonical
form, so a change to the manifest itself is noticed as well. It proves integrity, not origin:
whoever can write the folder can write the manifest. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlmone_fast.errors import DlmOneError, ModelFileError
from dlmone_fast.files import why_not_there
from dlmone_fast.models.plainfiles import (
    StrPath,
    dump_json,
    is_plain_name,
    read_bytes,
    read_json,
    regular_file,
    unreadable,
)

MANIFEST_NAME = "manifest.json"
_FORMAT = "dlmone_fast.manifest"
_VERSION = 1
_MAX_FILES = 10_000
_MAX_FILE_BYTES = 1 << 40
_MAX_MANIFEST_BYTES = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")

RESTORE = "copy the folder again from its source"
RESEAL = (
    f"{RESTORE}, or, if the change was meant, call "
    "dlmone_fast.models.manifest.write_manifest(folder)"
)


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says about one file."""

    size: int
    sha256: str


def hash_file(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: StrPath, error: type[DlmOneError] = ModelFileError) -> None:
    """Write manifest.json over every file that lies in the folder now, hidden ones left out.

    Raises:
        error: the folder holds a sub-folder or a name that a manifest cannot hold.
        OSError: a file cannot be read or the manifest not written.
    """
    folder = Path(folder)
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST_NAME and not path.name.startswith("."):
            regular_file(folder, path.name, error)
            files[path.name] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    text = dump_json({"format": _FORMAT, "version": _VERSION, "files": files})
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


def read_manifest(
    folder: StrPath, error: type[DlmOneError] = ModelFileError
) -> dict[str, FileRecord]:
    """Read manifest.json without looking at the files it lists.

    Raises:
        error: the manifest is missing, malformed, or of a newer version.
    """
    folder = Path(folder)
    where = folder / MANIFEST_NAME
    # os.path: is_dir of a path that the system does not take raises.
    if not os.path.isdir(folder):
        raise error(f"{folder}: no such folder ({why_not_there(folder)}); check the path")
    content = read_json(folder, MANIFEST_NAME, error, _MAX_MANIFEST_BYTES)
    if content.get("format") != _FORMAT or type(content.get("version")) is not int:
        raise error(f"{where}: is not a dlmone_fast manifest; {RESEAL}")
    if content["version"] != _VERSION:
        raise error(
            f"{where}: has version {content['version']}, this release reads {_VERSION}; "
            "install a newer dlmone_fast"
        )
    records = _records(content, where, error)
    # Re-serialising catches what parsing forgives: other white space, escapes, appended text.
    canonical = dump_json(content).encode()
    if canonical != read_bytes(folder, MANIFEST_NAME, error, _MAX_MANIFEST_BYTES):
        raise error(f"{where}: was changed after it was written; {RESEAL}")
    return records


def verify_manifest(
    folder: StrPath,
    error: type[DlmOneError] = ModelFileError,
    required: tuple[str, ...] = (),
) -> dict[str, FileRecord]:
    """Check every listed file's presence, size and sha256; return what the manifest lists.

    Files that the manifest does not list are left alone (a note, a .DS_Store): nothing in this
    package reads a file that is not listed.

    Args:
        required: names that the manifest must list.

    Raises:
        error: naming the first file at fault and the reason.
    """
    folder = Path(folder)
    records = read_manifest(folder, error)
    for name in required:
        if name not in records:
            raise error(f"{folder / name}: is not listed in {MANIFEST_NAME}; {RESEAL}")
    for name, record in records.items():
        _verify_file(folder, name, record, error)
    return records


def is_all_listed(folder: StrPath) -> bool:
    """True if a folder's manifest names every file in it: nobody has put another one there."""
    try:
        names = {MANIFEST_NAME, *read_manifest(folder)}
        return names.issuperset(os.listdir(folder))
    except (ModelFileError, OSError):
        return False


def identities(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Which file stands under each name in the folder now: inode, size and time of last change."""
    found: dict[str, os.stat_result] = {}
    # What is wrong with the folder, a name with NUL too, is for verify_manifest to say.
    with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
        for entry in entries:
            # A link that leads nowhere, such as an editor's lock, concerns nobody but who lists it.
            with contextlib.suppress(OSError):
                found[entry.name] = entry.stat()
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in found.items()}


def check_unchanged(
    folder: Path,
    before: Mapping[str, tuple[int, int, int]],
    files: Iterable[str],
    error: type[DlmOneError] = ModelFileError,
) -> None:
    """Raise `error` if one of the files was replaced or written to since `identities` was called.

    What is read between the two calls is then what was verified between them: a folder that is
    published anew meanwhile cannot give the old configuration and the new weights.
    """
    after = identities(folder)
    for name in (MANIFEST_NAME, *files):
        if name not in after or after[name] != before.get(name):
            raise error(f"{folder / name}: was changed while it was read; load it again")


def _verify_file(folder: Path, name: str, record: FileRecord, error: type[DlmOneError]) -> None:
    path = regular_file(folder, name, error)
    try:
        size = path.stat().st_size
        if size != record.size:
            raise error(
                f"{path}: has {size:,} bytes, the manifest says {record.size:,}; the file is "
                f"damaged or was changed: {RESEAL}"
            )
        digest = hash_file(path)
    except OSError as reason:
        raise error(unreadable(path, reason)) from reason
    if digest != record.sha256:
        raise error(
            f"{path}: its sha256 is {digest[:12]}…, the manifest says {record.sha256[:12]}…; the "
            f"file is damaged or was changed: {RESEAL}"
        )


def _records(
    content: Mapping[str, Any], where: Path, error: type[DlmOneError]
) -> dict[str, FileRecord]:
    files = content.get("files")
    if set(content) != {"format", "version", "files"} or not isinstance(files, dict):
        raise error(f"{where}: expected the keys format, version and files; {RESEAL}")
    if len(files) > _MAX_FILES:
        raise error(
            f"{where}: lists {len(files):,} files, at most {_MAX_FILES:,} are allowed; {RESTORE}"
        )
    return {name: _record(name, entry, where, error) for name, entry in files.items()}


def _record(name: str, entry: object, where: Path, error: type[DlmOneError]) -> FileRecord:
    if not is_plain_name(name) or name == MANIFEST_NAME:
        raise error(f"{where}: {name!r} is not a plain file name; {RESTORE}")
    if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
        raise error(f"{where}: the entry of {name} must hold size and sha256; {RESEAL}")
    size, digest = entry["size"], entry["sha256"]
    if type(size) is not int or not 0 <= size <= _MAX_FILE_BYTES:
        raise error(
            f"{where}: the size of {name} must be between 0 and {_MAX_FILE_BYTES:,} bytes, "
            f"got {size!r:.40}; {RESTORE}"
        )
    if not isinstance(digest, str) or _SHA256.fullmatch(digest) is None:
        raise error(f"{where}: the sha256 of {name} must be 64 hexadecimal digits; {RESTORE}")
    return FileRecord(size, digest)
