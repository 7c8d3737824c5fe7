"""Training checkpoints: numbered folders that are complete and verified, or not there at all.

A checkpoint is `step-00000123/` with named safetensors files (model, optimizer, …), `state.json`,
`config.toml` and `manifest.json`. Its folder appears under that name in one rename; older ones
are deleted only after the new one was read back against its manifest.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dlmone_fast.errors import CheckpointError
from dlmone_fast.models.commit import (
    commit_directory,
    complete_path,
    original_name,
    remove_directory,
    remove_leftovers,
)
from dlmone_fast.models.manifest import (
    check_unchanged,
    identities,
    is_all_listed,
    verify_manifest,
)
from dlmone_fast.models.plainfiles import (
    StrPath,
    is_plain_name,
    read_bytes,
    read_json,
    unreadable,
    write_json,
)
from dlmone_fast.models.tensors import check_finite, check_like, read_tensors, write_tensors

FORMAT = "dlmone_fast.checkpoint"
VERSION = 1
STATE_NAME = "state.json"
CONFIG_NAME = "config.toml"
_STEP = re.compile(r"step-(\d{8,12})")
_LEFTOVER = re.compile(r"(\.old-|abandoned-)?step-\d{8,12}")
MAX_STEP = 10**12 - 1
_MAX_CONFIG_BYTES = 1 << 20
_MAX_FILES = 100
_OTHER = "resume from another checkpoint"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files all matched its manifest."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Tensors by name within each named file, on the CPU."""
    state: dict[str, Any]
    config_text: str

    def group(self, name: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one file, with exactly the names, shapes and dtypes of `like`.

        Raises:
            CheckpointError: naming what is missing, unexpected or different.
        """
        found = self.tensors.get(name, {})
        check_like(like, found, self.path / f"{name}.safetensors", error=CheckpointError)
        return found

    def value(self, name: str, *kinds: type, default: Any = None) -> Any:
        """An entry of the state that is of one of the given types; `default` if there is none.

        Raises:
            CheckpointError: it is of another type or not finite, or missing without a default.
        """
        if name not in self.state and default is not None:
            return default
        found = self.state.get(name)
        # JSON has no Infinity, but 1e999 is read as one.
        endless = type(found) is float and not math.isfinite(found)
        if name not in self.state or type(found) not in kinds or endless:
            raise CheckpointError(
                f"{self.path / STATE_NAME}: {name} must be "
                f"{' or '.join(kind.__name__ for kind in kinds)}, got {found!r:.80}; {_OTHER}"
            )
        return found

    def check_step(self, most: int) -> None:
        """Raise CheckpointError if this is of a later step than the last one of its phase."""
        if self.step > most:
            raise CheckpointError(
                f"{self.path / STATE_NAME}: step is {self.step}, the phase has {most} steps; "
                "resume with the configuration of the checkpoint"
            )


def is_count(value: object) -> bool:
    """Whether a value from state.json can be a number of steps."""
    return type(value) is int and 0 <= value <= MAX_STEP


def save_checkpoint(
    root: StrPath,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config_text: str,
    *,
    keep: int = 2,
    protect: Set[int] = frozenset(),
    require_finite: bool = True,
) -> Path:
    """Write `root/step-XXXXXXXX`, read it back, then delete what is no longer kept.

    Kept are this checkpoint, the newest verified ones up to `keep` in all, and the steps in
    `protect`. Checkpoints of later steps belong to a run that this one leaves behind (it resumed
    from an earlier checkpoint): they are renamed to `abandoned-step-XXXXXXXX`, so that no later
    run resumes from them, and are otherwise left alone.

    Args:
        root: the checkpoints folder of one phase; one process writes to it at a time.
        step: number of finished steps.
        tensors: file name (without suffix) → tensors by name.
        state: any JSON object without NaN or Infinity.
        config_text: the resolved configuration as TOML.
        require_finite: refuse tensors with NaN or Infinity.

    Raises:
        CheckpointError: a value cannot be stored, the folder cannot be written, or what was
            written does not read back. All earlier checkpoints are then intact.
    """
    root = Path(root)
    if type(step) is not int or not 0 <= step <= MAX_STEP or keep < 1:
        raise CheckpointError(
            f"step must be between 0 and {MAX_STEP} and keep at least 1; got {step!r}, {keep!r}"
        )
    _check_names(tensors, root)
    target = root / f"step-{step:08d}"
    if require_finite:
        for name, group in tensors.items():
            check_finite(group, target / f"{name}.safetensors", CheckpointError)
    head = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "tensors": sorted(tensors),
        "state": dict(state),
    }

    def write(folder: Path) -> None:
        write_json(folder / STATE_NAME, head, CheckpointError)
        (folder / CONFIG_NAME).write_text(config_text, encoding="utf-8")
        for name, group in tensors.items():
            write_tensors(folder / f"{name}.safetensors", group)

    path = commit_directory(target, write, error=CheckpointError)
    verify_manifest(path, CheckpointError)
    try:
        _abandon_later(path.parent, step)
        _prune(path.parent, step, keep, protect)
        remove_leftovers(path.parent, _LEFTOVER)
    except OSError as reason:
        # The new checkpoint stands; a failure to tidy up must not end the training.
        logger.warning("old checkpoints in %s could not be removed: %s", root, reason)
    return path


def load_checkpoint(path: StrPath, *, require_finite: bool = True) -> Checkpoint:
    """Load one checkpoint after checking every file against its manifest.

    Raises:
        CheckpointError: naming the file and the reason.
    """
    path = complete_path(path)
    before = identities(path)
    head = _verified_head(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in head["tensors"]:
        tensors[name] = read_tensors(path, f"{name}.safetensors", CheckpointError)
        if require_finite:
            check_finite(tensors[name], path / f"{name}.safetensors", CheckpointError)
    config = read_bytes(path, CONFIG_NAME, CheckpointError, _MAX_CONFIG_BYTES)
    try:
        config_text = config.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise CheckpointError(
            f"{path / CONFIG_NAME}: is not UTF-8 ({reason}); {_OTHER}"
        ) from reason
    read = (STATE_NAME, CONFIG_NAME, *(f"{name}.safetensors" for name in tensors))
    check_unchanged(path, before, read, CheckpointError)
    return Checkpoint(path, head["step"], tensors, head["state"], config_text)


def list_checkpoints(root: StrPath) -> list[tuple[int, Path]]:
    """Return (step, folder) of what lies in `root`, by ascending step, nothing verified."""
    root = Path(root)
    found: dict[int, Path] = {}
    try:
        entries = sorted(root.iterdir()) if root.exists() else []
    except OSError as reason:
        raise CheckpointError(unreadable(root, reason)) from reason
    for path in entries:
        match = _STEP.fullmatch(original_name(path))
        if match and os.path.isdir(path):
            # ".old-step-…" sorts before "step-…", which replaces it.
            found[int(match[1])] = path
    return sorted(found.items())


def find_latest(root: StrPath) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest checkpoint in `root` that verifies, and (folder, reason) of each skipped.

    The folder is None if `root` holds none; `root` need not exist.
    """
    skipped: list[tuple[Path, str]] = []
    for _, path in reversed(list_checkpoints(root)):
        try:
            _verified_head(path)
        except CheckpointError as reason:
            skipped.append((path, str(reason)))
        else:
            return path, skipped
    return None, skipped


def resolve_resume(root: StrPath, resume: StrPath = "auto") -> Path | None:
    """Return the checkpoint folder to resume from, or None to start from the first step.

    Args:
        root: the checkpoints folder of the phase.
        resume: "auto": the newest one that verifies, with a logged warning for each damaged one
            that is skipped; "never": None; otherwise the path of one checkpoint.

    Raises:
        CheckpointError: the given checkpoint is damaged, or "auto" found only damaged ones.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return _explicit(Path(resume))
    path, skipped = find_latest(root)
    for _, reason in skipped:
        logger.warning("damaged checkpoint skipped: %s", reason)
    if path is None and skipped:
        raise CheckpointError(
            f"{root}: none of its {len(skipped)} checkpoints is intact; the newest: "
            f"{skipped[0][1]}; choose another run folder"
        )
    return path


def _explicit(path: Path) -> Path:
    inside = list_checkpoints(path) if os.path.isdir(path) else []
    if inside:
        raise CheckpointError(
            f"{path}: holds several checkpoints; name one of them, e.g. {inside[-1][1]}"
        )
    _verified_head(complete_path(path))
    return complete_path(path)


def _check_names(tensors: Mapping[str, object], root: Path) -> None:
    for name in tensors:
        if not is_plain_name(f"{name}.safetensors") or "." in name:
            raise CheckpointError(
                f"{root}: {name!r} cannot name a tensor file; use letters, digits, '_' and '-'"
            )
    if len(tensors) > _MAX_FILES:
        raise CheckpointError(
            f"{root}: at most {_MAX_FILES} tensor files, got {len(tensors)}; put them together"
        )


def _verified_head(path: Path) -> dict[str, Any]:
    """Verify a checkpoint folder and return the content of its state.json."""
    files = verify_manifest(path, CheckpointError, required=(STATE_NAME, CONFIG_NAME))
    head = read_json(path, STATE_NAME, CheckpointError)
    where = path / STATE_NAME
    if head.get("format") != FORMAT or head.get("version") != VERSION:
        raise CheckpointError(
            f"{where}: expected format {FORMAT} version {VERSION}, got "
            f"{head.get('format')!r:.80} version {head.get('version')!r:.80}; {_OTHER}"
        )
    step, names = head.get("step"), head.get("tensors")
    if not is_count(step) or not isinstance(head.get("state"), dict):
        raise CheckpointError(
            f"{where}: must hold a whole number 'step' between 0 and {MAX_STEP} and an object "
            f"'state', got step {step!r:.40}; {_OTHER}"
        )
    named = _STEP.fullmatch(original_name(path))
    if named and int(named[1]) != step:
        raise CheckpointError(
            f"{where}: is of step {step}, its folder is {path.name}; the folders were mixed up"
        )
    if not isinstance(names, list) or len(names) > _MAX_FILES:
        raise CheckpointError(f"{where}: 'tensors' must list up to {_MAX_FILES} names; {_OTHER}")
    for name in names:
        if not isinstance(name, str) or f"{name}.safetensors" not in files:
            raise CheckpointError(
                f"{path}: {name!r:.80}.safetensors is not in the manifest; {_OTHER}"
            )
    return head


def _verifies(path: Path) -> bool:
    try:
        _verified_head(path)
    except CheckpointError:
        return False
    return True


def _abandon_later(root: Path, step: int) -> None:
    for later, path in list_checkpoints(root):
        if later > step:
            left = root / f"abandoned-step-{later:08d}"
            if os.path.lexists(left):
                if not is_all_listed(left):
                    logger.warning("%s stays: %s holds files that no run wrote", path, left.name)
                    continue
                remove_directory(left)
            path.rename(left)
            logger.warning("%s is of a later step than this run's; renamed to %s", path, left.name)


def _prune(root: Path, step: int, keep: int, protect: Set[int]) -> None:
    """Delete what is older than the newest `keep` verified checkpoints and not protected.

    A folder that no manifest vouches for, or that a user has put a file into, stays. Damaged
    checkpoints do not count, and stay until `keep` newer ones verify.
    """
    kept = 0
    for number, path in reversed(list_checkpoints(root)):
        if kept >= keep:
            if number not in protect and is_all_listed(path):
                remove_directory(path)
        elif number == step or _verifies(path):
            kept += 1
