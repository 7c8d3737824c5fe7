"""Names of devices."""

from __future__ import annotations

import re

import torch

from dlmone_fast.errors import UsageError


def pick_device(name: str | torch.device) -> torch.device:
    """The torch device of a name; auto: a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(name, torch.device):
        name = str(name)
    if not isinstance(name, str) or not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    # Not torch.device's own index, which wraps at 128.
    index = int(name.partition(":")[2] or 0)
    if name != "cpu" and index >= torch.cuda.device_count():
        raise UsageError(
            f"device {name!r} is not there: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs; use device='cpu' or 'auto'"
        )
    return torch.device(name)
