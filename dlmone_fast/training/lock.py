"""One training at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dlmone_fast.errors import UsageError
from dlmone_fast.training.owned import writing

LOCK_NAME = ".lock"

# A file system that has no locks, some network ones among them.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_MAX_PID_BYTES = 20

logger = logging.getLogger(__name__)


@contextmanager
def only_training_in(root: Path) -> Iterator[None]:
    """Keep every other training out of a run folder, which is made if need be.

    The kernel takes the lock back when the process ends, however it ends, so that a killed one
    leaves nothing to clear. Reading the folder needs no lock.

    Raises:
        UsageError: a training runs in the folder, in another process or in this one; or a file of
            the lock's name is there that no training wrote.
        CheckpointError: the folder cannot be written.
    """
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _take(descriptor, root)
        yield
    finally:
        # A process forked meanwhile has the descriptor too: closing alone would not unlock.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _take(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as reason:
        pid = os.pread(descriptor, _MAX_PID_BYTES, 0).decode("ascii", "replace").strip()
        raise UsageError(
            f"{root}: is in use by another training, process {pid or 'unknown'}; wait for it, "
            "stop it, or use another --output-dir"
        ) from reason
    except OSError as reason:
        if reason.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: cannot be locked (%s); start one training in it", root, reason.strerror)
    before = os.pread(descriptor, _MAX_PID_BYTES, 0)
    if before.strip() and not before.strip().isdigit():
        raise UsageError(
            f"{root / LOCK_NAME}: was not written by a training, which locks its folder with a "
            "file of that name; use another --output-dir, or move it away"
        )
    with writing(root / LOCK_NAME):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
