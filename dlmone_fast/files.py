"""Writing files so that a reader sees the old content or the new one, never a torn one."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

_KEPT_BYTES = 180

StrPath = str | os.PathLike[str]


def real_path(path: StrPath) -> Path:
    """The absolute path without symbolic links, as far as they can be followed.

    pathlib's `resolve` raises where they lead round in a loop.
    """
    try:
        return Path(os.path.realpath(path))
    # A NUL in the name.
    except ValueError:
        return Path(os.path.abspath(path))


def why_not_there(path: StrPath) -> str:
    """The system's word on a path where no file or folder can be found, for a message.

    pathlib's `exists`, `is_dir` and `is_file` raise what the system says, and those of os.path keep
    it back: ask them, and then this.
    """
    try:
        os.stat(path)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    return "it is of another kind"


def prove_writable(path: StrPath) -> None:
    """Raise the OSError that writing this file would end with, as far as it is known beforehand.

    For what takes long to make: the folder is made, and a file of no name opened in it.
    """
    target = real_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    # A device or a pipe is written to as it is.
    if not target.exists() or target.is_file():
        with tempfile.TemporaryFile(dir=target.parent):
            pass


def fsync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Write `chunks` to a hidden file beside `path`, fsync it, then rename it over `path`.

    A link is followed; what is no regular file (a device, a pipe) is written to as it is.
    Raises OSError as the system gave it (disk full, no permission); `path` is then untouched
    and the hidden file is gone.
    """
    path = real_path(path)
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as stream:
            stream.writelines(chunks)
        return
    # Of a name as long as names may be, what is added would make one too long.
    short = path.name.encode()[:_KEPT_BYTES].decode(errors="ignore")
    temporary = path.with_name(f".{short}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)
