"""The proof of what a run wrote into its folder: nothing is removed by its name alone.

RUN/run.json names the hashes of the files that the run wrote and what they were made from. It is
written before them, so that a run that is killed between two writes still knows its own. Model
folders and checkpoints prove themselves by their manifests.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dlmone_fast.config import Config, from_dict, load_toml, to_dict
from dlmone_fast.errors import CheckpointError, ConfigError, DlmOneError, ModelFileError, UsageError
from dlmone_fast.files import real_path, write_atomically
from dlmone_fast.models.checkpoint import CONFIG_NAME as CHECKPOINT_CONFIG
from dlmone_fast.models.checkpoint import STATE_NAME, find_latest
from dlmone_fast.models.commit import remove_directory
from dlmone_fast.models.folder import CONFIG_NAME as MODEL_CONFIG
from dlmone_fast.models.manifest import MANIFEST_NAME, hash_file, read_manifest, verify_manifest
from dlmone_fast.models.plainfiles import dump_json, read_json, unreadable, unwritable

PHASES = ("teacher", "pairs", "stage1", "stage2")
MODEL_FOLDERS = ("teacher", "stage1", "stage2")
RECORD_NAME = "run.json"

_FORMAT = "dlmone_fast.run"
_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHECKPOINT = re.compile(r"(\.old-|abandoned-)?step-\d{8,12}")
_SHOWN = 3
_ELSEWHERE = "use another --output-dir, or move it away"

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json.

    Attributes:
        files: hashes that each file of the run may have, by its name within the folder. Two while
            it is replaced.
        made_from: what a file was made from, by its name: hashes and settings.
        starts: how often the run was started over, this time included.
    """

    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    made_from: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    starts: int = 1

    def wrote(self, root: Path, name: str) -> bool:
        """True if the file of this name is, byte for byte, one that the run wrote."""
        known, file = self.files.get(name, ()), root / name
        return bool(known) and os.path.isfile(file) and _hash(file) in known

    def saved(self, root: Path) -> RunRecord:
        """Write it to its folder."""
        content = {
            "format": _FORMAT, "version": _VERSION, "starts": self.starts,
            "files": {name: list(hashes) for name, hashes in self.files.items()},
            "made_from": {name: dict(source) for name, source in self.made_from.items()},
        }  # fmt: skip
        file, text = root / RECORD_NAME, dump_json(content).encode()
        if not os.path.isfile(file) or file.read_bytes() != text:
            write_atomically(file, [text])
        return self


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write of something in the run folder into a CheckpointError that names it."""
    try:
        yield
    except OSError as reason:
        raise CheckpointError(unwritable(path, reason)) from reason


def read_record(root: Path) -> RunRecord | None:
    """The record of the run in a folder, or of one of a version that wrote none; None: no run.

    Raises:
        UsageError: run.json is not a run's.
    """
    file = root / RECORD_NAME
    if not os.path.lexists(file):
        return _of_a_run_without_record(root)
    try:
        content = read_json(root, RECORD_NAME, UsageError)
    except UsageError as error:
        raise UsageError(f"{file}: is not the record of a run ({error}); {_ELSEWHERE}") from error
    parts: list[Any] = [content.get(key) for key in ("files", "made_from", "starts")]
    files, made_from, starts = parts
    valid = (
        content.get("format") == _FORMAT
        and isinstance(files, dict)
        and all(_are_hashes(hashes) for hashes in files.values())
        and isinstance(made_from, dict)
        and all(isinstance(source, dict) for source in made_from.values())
        and type(starts) is int
    )
    if not valid:
        raise UsageError(f"{file}: is not the record of a run; {_ELSEWHERE}")
    if content.get("version") != _VERSION:
        raise UsageError(
            f"{file}: has version {content.get('version')!r:.40}, this release reads {_VERSION}; "
            "install a newer dlmone_fast, or use another --output-dir"
        )
    return RunRecord(files, made_from, starts)


def check_free(root: Path) -> None:
    """Refuse a folder where something that no run wrote stands at a place that this run writes to.

    Raises:
        UsageError: naming the first of them.
        CheckpointError: a folder of the run cannot be written to.
    """
    for name in ("checkpoints", "cache", "tensorboard", *(f"checkpoints/{p}" for p in PHASES)):
        folder = root / name
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise UsageError(f"{folder}: is no folder, and the run keeps files in it; {_ELSEWHERE}")
        if os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
            refusal = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            raise CheckpointError(unwritable(folder, refusal))
    for phase in MODEL_FOLDERS:
        folder = root / phase
        if not os.path.lexists(folder) or os.path.isfile(folder / MANIFEST_NAME):
            continue
        inside = _names(folder) if os.path.isdir(folder) else []
        if inside or not os.path.isdir(folder):
            what = f"holds {_listed(inside)} and no {MANIFEST_NAME}" if inside else "is a file"
            raise UsageError(
                f"{folder}: {what}, so that no run wrote it, and the run writes its model there; "
                f"{_ELSEWHERE}"
            )
    for name, is_ours in (("metrics.jsonl", _is_log), ("comparison.json", _is_comparison)):
        file = root / name
        if os.path.isfile(file) and not is_ours(file):
            raise _foreign(file)


def check_files(
    root: Path, record: RunRecord | None, wanted: Mapping[str, str], keep: Iterable[StrPath] = ()
) -> None:
    """Refuse to replace a file that is neither the run's nor what the run would write anyway.

    Args:
        wanted: sha256 of what is to be written, by name.
        keep: files and folders of the caller's, which no run replaces.

    Raises:
        UsageError: naming the file.
    """
    kept = _inside(root, keep)
    for name, sha256 in wanted.items():
        file = root / name
        if not os.path.lexists(file):
            continue
        if not os.path.isfile(file):
            raise UsageError(f"{file}: is no file, and the run writes one there; {_ELSEWHERE}")
        if _hash(file) == sha256:
            continue
        if _is_kept(file, kept):
            raise UsageError(
                f"{file}: is given to this run, which would write a file of that name; copy it to "
                f"another place and name that, or {_OTHER}"
            )
        if record is not None and record.wrote(root, name):
            continue
        raise _foreign(file, changed=record is not None and name in record.files)


def check_removable(
    root: Path, record: RunRecord | None, phases: Sequence[str], keep: Iterable[StrPath] = ()
) -> None:
    """Refuse to start phases over where something that no run wrote would have to go.

    Raises:
        UsageError: naming the first thing that is not proven; nothing has been removed.
    """
    kept = _inside(root, keep)
    for phase in phases:
        folder = root / phase
        if phase in MODEL_FOLDERS and os.path.lexists(folder) and not _is_kept(folder, kept):
            _check_model(folder, phase)
        for checkpoint in _checkpoints(root, phase):
            if not _is_kept(checkpoint, kept):
                _check_checkpoint(checkpoint)
    if not set(PHASES) <= set(phases):
        return
    for name in ("config.toml", "tokenizer.json"):
        file = root / name
        if os.path.lexists(file) and not _is_kept(file, kept):
            if record is None or name not in record.files:
                raise _foreign(file)
            if not record.wrote(root, name):
                raise _foreign(file, changed=True)
    log = root / "metrics.jsonl"
    if os.path.isfile(log) and not _is_log(log, whole=True):
        raise _foreign(log)


def remove(
    root: Path, record: RunRecord | None, phases: Sequence[str], keep: Iterable[StrPath] = ()
) -> None:
    """Remove what `check_removable` has proven to be a run's; what a user put beside it stays."""
    kept = _inside(root, keep)
    for phase in phases:
        folder = root / phase
        doomed = [folder] if phase in MODEL_FOLDERS and os.path.isdir(folder) else []
        for path in (*doomed, *_checkpoints(root, phase)):
            if not _is_kept(path, kept):
                remove_directory(path)
        with suppress(OSError):
            (root / "checkpoints" / phase).rmdir()
    if not set(PHASES) <= set(phases):
        return
    names = [*(record.files if record else ()), "metrics.jsonl"]
    for name in names:
        file = root / name
        ours = name == "metrics.jsonl" or (record is not None and record.wrote(root, name))
        if os.path.isfile(file) and ours and not _is_kept(file, kept):
            file.unlink()
    for name in ("checkpoints", "data"):
        with suppress(OSError):
            (root / name).rmdir()


def has_trained(root: Path) -> bool:
    """True if a phase has left a checkpoint or a model folder."""
    return any(
        os.path.isfile(root / phase / MANIFEST_NAME) or _checkpoints(root, phase)
        for phase in PHASES
    )


def is_of_phase(folder: Path, phase: str) -> bool:
    """True if a model folder's own description says that this phase of a run wrote it."""
    try:
        source = read_json(folder, MODEL_CONFIG, ModelFileError).get("source")
    except DlmOneError:
        return False
    return isinstance(source, dict) and source.get("phase") == phase


_OTHER = "use another --output-dir"


def _foreign(file: Path, changed: bool = False) -> UsageError:
    if changed:
        return UsageError(
            f"{file}: was changed after the run wrote it; restore it, move it away, or {_OTHER}"
        )
    return UsageError(
        f"{file}: was not written by a run, and the run writes a file of that name; {_ELSEWHERE}"
    )


def _check_model(folder: Path, phase: str) -> None:
    problem = "is no model folder of a run"
    try:
        listed = verify_manifest(folder)
        extra = [name for name in _names(folder) if name not in (*listed, MANIFEST_NAME)]
        if extra:
            problem = f"holds {_listed(extra)}, which no run wrote"
        elif is_of_phase(folder, phase):
            return
    except ModelFileError as error:
        problem = f"is not as a run wrote it ({error})"
    raise UsageError(f"{folder}: {problem}, so that it is not removed to start over; {_ELSEWHERE}")


def _check_checkpoint(folder: Path) -> None:
    problem = "is no checkpoint of a run"
    try:
        # The names alone: a damaged checkpoint is a run's too.
        listed = read_manifest(folder, CheckpointError)
        extra = [name for name in _names(folder) if name not in (*listed, MANIFEST_NAME)]
        if extra:
            problem = f"holds {_listed(extra)}, which no run wrote"
        elif {STATE_NAME, CHECKPOINT_CONFIG} <= set(listed):
            return
    except CheckpointError as error:
        problem = f"is not as a run wrote it ({error})"
    raise UsageError(f"{folder}: {problem}, so that it is not removed to start over; {_ELSEWHERE}")


def _checkpoints(root: Path, phase: str) -> list[Path]:
    folder = root / "checkpoints" / phase
    names = _names(folder) if os.path.isdir(folder) else []
    return [folder / name for name in names if _CHECKPOINT.fullmatch(name)]


def _of_a_run_without_record(root: Path) -> RunRecord | None:
    """The record of a run that kept none: its config.toml is the one that a checkpoint or model
    folder under a manifest was made with."""
    file = root / "config.toml"
    if not os.path.isfile(file):
        return None
    try:
        values = load_toml(file)
        config = from_dict(values)
    except ConfigError:
        return None
    # A run writes every section; a user's file seldom has them all.
    whole = {key for key, value in to_dict(config).items() if isinstance(value, dict)}
    if not whole <= set(values) or not any(_proves(root, phase, config) for phase in PHASES):
        return None
    names = [name for name in ("config.toml", "tokenizer.json") if os.path.isfile(root / name)]
    return RunRecord({name: [_hash(root / name)] for name in names})


def _proves(root: Path, phase: str, config: Config) -> bool:
    """True if a phase's newest checkpoint, or its model folder, is of a run of a configuration."""
    try:
        newest = find_latest(root / "checkpoints" / phase)[0]
        if newest is not None:
            made_with = from_dict(load_toml(newest / CHECKPOINT_CONFIG))
            return to_dict(made_with)["model"] == to_dict(config)["model"]
        if phase not in MODEL_FOLDERS or not is_of_phase(root / phase, phase):
            return False
        verify_manifest(root / phase)
        model = read_json(root / phase, MODEL_CONFIG, ModelFileError).get("model")
        return isinstance(model, dict) and model == to_dict(config)["model"]
    except DlmOneError:
        return False


def _are_hashes(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, str) and _SHA256.fullmatch(value) for value in values
    )


def _is_log(file: Path, whole: bool = False) -> bool:
    """True if a file holds records of a run, judged by its first line or by all of them."""
    try:
        with file.open("rb") as stream:
            return all(map(_is_record, stream if whole else islice(stream, 1)))
    except OSError as reason:
        raise CheckpointError(unreadable(file, reason)) from reason


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        # A process that was killed leaves half a line.
        begins = [f'{{"phase": "{phase}"'.encode() for phase in PHASES]
        torn = line.rstrip(b"\n")
        return any(torn.startswith(begin) or begin.startswith(torn) for begin in begins)
    return isinstance(record, dict) and record.get("phase") in PHASES and "step" in record


def _is_comparison(file: Path) -> bool:
    try:
        content = read_json(file.parent, file.name, UsageError)
    except UsageError:
        return False
    return {"preset", "seed", "rows", "fewest_teacher_steps"} <= set(content)


def _hash(file: Path) -> str:
    try:
        return hash_file(file)
    except OSError as reason:
        raise CheckpointError(unreadable(file, reason)) from reason


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as reason:
        raise CheckpointError(unreadable(folder, reason)) from reason


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _inside(root: Path, paths: Iterable[StrPath]) -> list[Path]:
    """Those of the paths that lie in a folder; the folder itself holds more than what is meant."""
    here = real_path(root)
    kept = [real_path(path) for path in paths if os.fspath(path)]
    return [path for path in kept if path != here and path.is_relative_to(here)]


def _is_kept(path: Path, kept: Sequence[Path]) -> bool:
    """True if a path is, lies in, or holds one of those that are not to be touched."""
    here = real_path(path)
    return any(here.is_relative_to(other) or other.is_relative_to(here) for other in kept)
