"""`dlmone_fast.load` and `dlmone_fast.generate`: the model that a call uses when it names none."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dlmone_fast.errors import ModelNotLoadedError, UsageError
from dlmone_fast.files import real_path
from dlmone_fast.runtime import hub
from dlmone_fast.runtime.generator import Generator
from dlmone_fast.runtime.loading import load_model
from dlmone_fast.runtime.pool import MAX_QUEUED

ENVIRONMENT_VARIABLE = "DLMONE_FAST_MODEL"

_MOST_KEPT = 8
"""Models named by their folders that `generate` keeps; the one that was used longest ago goes."""

_lock = threading.Lock()
_loading: dict[Path, threading.Lock] = {}
_loaded: dict[Path, tuple[int, Generator]] = {}
_last: list[Generator] = []


def load(
    path_or_name: str | os.PathLike[str],
    device: str = "auto",
    dtype: str = "auto",
    *,
    backend: str = "auto",
    calibration: Sequence[str] | None = None,
    max_queued: int = MAX_QUEUED,
) -> Generator:
    """Load a model and make it the one that `generate` uses when it is given no model.

    Args:
        path_or_name: a model folder, or the name of a packaged model.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        dtype: auto (fp32 on a CPU, bf16 on a GPU), fp32, bf16, fp16 or int8.
        backend: what runs the network: auto, eager, compile, graph (CUDA) or openvino (CPU).
        calibration: real prompts, some hundred, that int8 measures its scales on.
        max_queued: calls that may wait for the model before `QueueFullError`.

    Raises:
        ModelFileError: the folder is missing, damaged or does not fit.
        UsageError: the device or dtype does not exist here.
        BackendUnavailableError: the backend asked for cannot run this model here.
    """
    generator = load_model(
        path_or_name,
        device,
        dtype,
        backend=backend,
        calibration=calibration,
        max_queued=max_queued,
    )
    with _lock:
        _last[:] = [generator]
    return generator


def generate(
    batch: str | Sequence[str],
    *,
    model: Generator | str | os.PathLike[str] | None = None,
    **call: Any,
) -> Any:
    """Generate a target text for each source text, in one network call by default.

    Args:
        batch: one source text (gives a str), or a list of them (gives a list in order).
        model: a `Generator` or a model folder. None: the last `load`, else the folder in
            DLMONE_FAST_MODEL.
        call: `steps`, `num_candidates`, `select`, `seed`, `batch_size`, `sampler`,
            `eta`, `temperature`, `on_overflow`, `batch_invariant`, `return_dict`, `progress`: see
            `Generator.generate`.

    Raises:
        ModelNotLoadedError: no model is named and none is found.
        PromptError: a prompt is not a str, not Unicode, or too long.
        UsageError: another argument is out of its bounds.
    """
    return _resolve(model).generate(batch, **call)


def unload() -> None:
    """Forget every model that `load` and `generate` keep, and give their engines' memory back."""
    with _lock:
        kept = [*_last, *(generator for _, generator in _loaded.values())]
        _last.clear()
        _loaded.clear()
    with ExitStack() as every:
        # All of them, even if one refuses.
        for generator in kept:
            every.callback(generator.unload)


def default_folder() -> Path | None:
    """The model folder that `generate` uses when none is named or loaded."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named) if named else None


def from_pretrained(
    path_or_name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    download: bool = False,
    **options: Any,
) -> Generator:
    """`load` under the name that users of model hubs expect.

    Args:
        path_or_name: a model folder, or with `download` a hub id (owner/name).
        revision: branch, tag or commit of the hub repository.
        download: fetch a hub id; without it nothing touches the network.
        options: `device`, `dtype`, `backend` and the others of `load`.

    Raises:
        UsageError: a hub id without `download`, or without huggingface_hub; `download` or
            `revision` for a folder.
        ModelFileError: the folder is missing, damaged or does not fit, or cannot be fetched.
    """
    if not hub.is_repository(path_or_name) or os.path.exists(path_or_name):
        if revision is not None or download:
            unused = "download=True" if revision is None else f"revision={revision!r}"
            raise UsageError(
                f"{unused}: belongs to a hub id (owner/name), and {os.fspath(path_or_name)!r} is a "
                "folder's path; leave it out"
            )
        return load(path_or_name, **options)
    if not download:
        raise UsageError(
            f"{os.fspath(path_or_name)!r} is no folder here; if it is a hub id, pass download=True"
        )
    return load(hub.download(os.fspath(path_or_name), revision), **options)


def _resolve(model: Generator | str | os.PathLike[str] | None) -> Generator:
    if isinstance(model, Generator):
        return model
    if model is not None:
        return _cached(Path(model))
    with _lock:
        # One that was unloaded is not a model any more.
        _last[:] = [generator for generator in _last if not generator.unloaded]
        if _last:
            return _last[0]
    folder = default_folder()
    if folder is not None:
        return _cached(folder)
    raise ModelNotLoadedError(
        "no model is loaded: pass model=FOLDER, call dlmone_fast.load(FOLDER), or set "
        f"{ENVIRONMENT_VARIABLE}; to train one in minutes: "
        "python -m dlmone_fast.train --preset grammar"
    )


def _cached(path: Path) -> Generator:
    # The manifest's time of change stands for the content: a retrained folder loads anew.
    manifest = path / "manifest.json"
    try:
        stamp = manifest.stat().st_mtime_ns
    # Why it cannot be read is told where it is.
    except (OSError, ValueError):
        stamp = 0
    key = real_path(path)
    with _lock:
        loading = _loading.setdefault(key, threading.Lock())
    # Calls on other models do not wait for this one to load.
    with loading:
        with _lock:
            kept = _loaded.pop(key, None)
        if kept is None or kept[0] != stamp or kept[1].unloaded:
            kept = stamp, load_model(path)
        with _lock:
            _loaded[key] = kept
            while len(_loaded) > _MOST_KEPT:
                _loaded.pop(next(iter(_loaded)))
        return kept[1]


def _after_fork() -> None:
    # Whoever held these locks is not in this process.
    global _lock
    _lock = threading.Lock()
    _loading.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
