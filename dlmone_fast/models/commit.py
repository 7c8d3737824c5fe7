"""Atomic writing of whole folders: a reader sees the complete old one or the complete new one.

A folder is written under a temporary sibling name, sealed with its manifest, fsynced, and renamed.
A folder that is replaced steps aside first, so at every instant a complete folder exists under
its name or its aside name; `complete_path` finds it. One process at a time may write a given
folder; any number may read. Standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from dlmone_fast.errors import DlmOneError, ModelFileError
from dlmone_fast.models.manifest import MANIFEST_NAME, read_manifest, write_manifest
from dlmone_fast.models.plainfiles import StrPath, unwritable

_TEMPORARY = re.compile(r"\.tmp-(?P<name>.+)-(?P<pid>\d{1,10})")


def commit_directory(
    target: StrPath,
    write: Callable[[Path], None],
    *,
    error: type[DlmOneError] = ModelFileError,
) -> Path:
    """Create or replace the folder `target` with what `write(folder)` puts into a folder.

    Only a folder that this function wrote, or an empty one, is ever replaced. Files that a user
    added to it are carried over.

    Args:
        target: the folder; its parents are created.
        write: fills the temporary folder it is given with plain files; no sub-folders.
        error: class of the error.

    Returns:
        The resolved path of the folder.

    Raises:
        error: the disk is full, the place cannot be written to, or `target` is something else.
            The previous folder is then intact and the temporary one gone.
    """
    target = _resolved(Path(target), error)
    try:
        _check_replaceable(target, error)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        staging = _temporary(target)
        try:
            staging.mkdir()
            write(staging)
            write_manifest(staging, error)
            _make_durable(staging)
            _swap_in(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            if not target.exists():
                _recover(target)
            raise
    except OSError as reason:
        raise error(unwritable(target, reason)) from reason
    return target


def complete_path(target: StrPath) -> Path:
    """Return `target`, or its aside when a replacement was cut off between its two renames."""
    target = Path(target)
    # os.path: a path that the system does not take, such as one that is too long, is not there.
    if not os.path.exists(target) and target.name and os.path.isdir(_aside(target)):
        return _aside(target)
    return target


def original_name(path: Path) -> str:
    """Return the name that a folder has, or had before it stepped aside."""
    return path.name.removeprefix(".old-")


def remove_directory(path: Path) -> None:
    """Delete a folder so that a cut leaves a temporary name, never half a folder under its own.

    Raises:
        OSError: the folder cannot be renamed; it is then intact.
    """
    doomed = _temporary(path)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path, name: str | re.Pattern[str]) -> None:
    """Finish or undo what dead processes left of folders of this name.

    Temporary folders go; an aside goes if its folder stands again, and takes its place if not.
    """
    pattern = name if isinstance(name, re.Pattern) else re.compile(re.escape(name))
    for path in parent.glob(".tmp-*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and pattern.fullmatch(match["name"]) and not _alive(int(match["pid"])):
            shutil.rmtree(path, ignore_errors=True)
    for path in parent.glob(".old-*"):
        if pattern.fullmatch(original_name(path)):
            _recover(parent / original_name(path))


def _resolved(target: Path, error: type[DlmOneError]) -> Path:
    try:
        return target.resolve()
    # RuntimeError is pathlib's report of a loop of symbolic links.
    except (OSError, RuntimeError) as reason:
        raise error(f"{target}: cannot be resolved ({reason}); choose another folder") from reason


def _temporary(target: Path) -> Path:
    return target.with_name(f".tmp-{target.name}-{os.getpid()}")


def _aside(target: Path) -> Path:
    return target.with_name(f".old-{target.name}")


def _alive(pid: int) -> bool:
    # This process holds no temporary folder while it looks: one with its id is an older
    # process's, which is common in containers, where ids start again at 1.
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _check_replaceable(target: Path, error: type[DlmOneError]) -> None:
    if not target.name:
        raise error(f"{target}: is not a folder that can be written; name a folder inside it")
    if not target.exists():
        return
    if not target.is_dir():
        raise error(f"{target}: is a file; choose another folder or move the file away")
    if any(target.iterdir()) and not (target / MANIFEST_NAME).is_file():
        raise error(
            f"{target}: holds files and no {MANIFEST_NAME}, so dlmone_fast did not write it and "
            "will not replace it; choose another folder"
        )


def _swap_in(staging: Path, target: Path) -> None:
    if target.exists():
        target.rename(_aside(target))
    staging.rename(target)
    _fsync(target.parent)
    _recover(target)


def _recover(target: Path) -> None:
    """Bring the aside back if the name is free; retire it if the new folder stands."""
    aside = _aside(target)
    if not aside.is_dir():
        return
    if not target.exists():
        aside.rename(target)
        _fsync(target.parent)
        return
    _carry_over(aside, target)
    shutil.rmtree(aside, ignore_errors=True)


def _carry_over(aside: Path, target: Path) -> None:
    """Move what a user added to the old folder into the new one."""
    try:
        known = {MANIFEST_NAME, *read_manifest(aside)}
    except ModelFileError:
        # Half deleted already: its manifest went, and a user's files were moved before that.
        return
    for path in aside.iterdir():
        if path.name not in known and not (target / path.name).exists():
            path.rename(target / path.name)


def _make_durable(folder: Path) -> None:
    # safetensors writes files that only their owner can read; the manifest has the mode that
    # this user's umask gives.
    mode = stat.S_IMODE((folder / MANIFEST_NAME).stat().st_mode)
    for path in sorted(folder.iterdir()):
        path.chmod(mode)
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    # Only POSIX can open a folder to fsync it.
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
