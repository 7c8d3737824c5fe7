"""What test_storage_failures has a training command do to its own storage."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from dlmone_fast.training import loop
from dlmone_fast.training.loop import save_checkpoint

_BYTES = 4000


def limit_after(last: int) -> None:
    """Once step `last` is saved, no file may become as large as weights are."""

    def save(root: Path, step: int, *arguments: Any, **options: Any) -> Path:
        if step > last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (_BYTES, _BYTES))
        return save_checkpoint(root, step, *arguments, **options)

    loop.save_checkpoint = save  # type: ignore[assignment]
