"""The models that ship with the package: model folders under `assets/`, known by their names."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"

# Task → the data folder that ships with the package.
DATA = {"g2p": ASSETS / "cmudict"}


@dataclass(frozen=True)
class PackagedModel:
    """One model that ships with the package.

    Attributes:
        name: what `dlmone_fast.load` takes.
        folder: its model folder.
        task: what it does, in a line.
        megabytes: size of its weights.
        scores: measured on the test split of its task, by metric.
        terms: what its data allow, in a line.
    """

    name: str
    folder: Path
    task: str
    megabytes: float
    scores: dict[str, float]
    terms: str


def models() -> list[PackagedModel]:
    """The packaged models, by name."""
    return [_described(file.parent) for file in sorted(ASSETS.glob("*/packaged.json"))]


def folder_of(path_or_name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The model folder that a name of a packaged model stands for; anything else as it is.

    A folder of that name in the working folder is taken before the packaged model.
    """
    if not isinstance(path_or_name, str) or os.path.exists(path_or_name):
        return path_or_name
    packaged = {model.name: model.folder for model in models()}
    return packaged.get(path_or_name, path_or_name)


def _described(folder: Path) -> PackagedModel:
    about: dict[str, Any] = json.loads((folder / "packaged.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return PackagedModel(
        folder.name, folder, about["task"], round(size / 1e6, 1), about["scores"], about["terms"]
    )
