"""Model folders from the Hugging Face hub: only when asked for, never implicitly."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

from dlmone_fast.errors import ModelFileError, UsageError

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
# Nothing but what a model folder holds is fetched: no code, no pickles.
_FILES = ["*.json", "model*.safetensors", "README.md"]


def is_repository(name: str | os.PathLike[str]) -> bool:
    """Whether a name has the form owner/name of a hub repository."""
    return _REPOSITORY.fullmatch(os.fspath(name)) is not None


def download(repository: str, revision: str | None = None) -> Path:
    """Fetch a model folder into the local cache and return its path.

    Files are real ones, not links into a blob store: a model folder that leads outside itself is
    refused when it is loaded.

    Args:
        repository: owner/name.
        revision: branch, tag or commit.

    Raises:
        UsageError: `huggingface_hub` is not installed.
        ModelFileError: the repository cannot be fetched.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise UsageError(
            f"model {repository!r} is a hub id, which needs huggingface_hub: "
            "pip install 'dlmone_fast[hub]', or give a local model folder"
        ) from None
    target = _cache() / repository.replace("/", "--") / (revision or "main")
    try:
        hub.snapshot_download(
            repository, revision=revision, local_dir=target, allow_patterns=_FILES
        )
    except Exception as error:
        # The library's errors come from several HTTP stacks and share no base class.
        raise ModelFileError(
            f"hub model {repository!r} (revision {revision or 'main'}) could not be fetched: "
            f"{type(error).__name__}: {error}; check the name and the network, or give a folder"
        ) from error
    return target


def _cache() -> Path:
    root = os.environ.get("DLMONE_FAST_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "dlmone_fast"
