"""Changes to sealed folders that their manifests vouch for: another hand wrote them, on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dlmone_fast.models.manifest import write_manifest


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Let `change` edit the tensors of a safetensors file in place, and seal its folder."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    write_manifest(path.parent)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Let `change` edit a JSON object in place, and seal its folder."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    write_manifest(path.parent)
