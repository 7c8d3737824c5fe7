"""The command `python -m dlmone_fast.release`: from data to a released student, in slices."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dlmone_fast.cli import parse, run_command
from dlmone_fast.errors import UsageError

if TYPE_CHECKING:
    from dlmone_fast.config import Config

DESCRIPTION = """Train a teacher, draw its paired endpoints, distil it in two stages, evaluate the
better student on the test split and write it as a model folder.

The same command again continues a run that stopped after its minutes, was killed, or moved to
another machine with its folder; the evaluation too, system by system. A schedule is a preset
(qqp-small, if it names none) with the schedule's keys over it. The run's folder gets release/: the
student that is better on the validation split, in bf16, with its evaluation on the test split, what
it has cost (devices, minutes and rows of each phase) and its card. Exit codes: 0 done, 2 usage, 3
data, 75 interrupted and saved: run it again.
"""

PRESET = "qqp-small"
SCHEDULES = Path(__file__).parent / "schedules"


@dataclass(frozen=True)
class ReleaseArgs:
    """Options of the command."""

    data_dir: str = ""
    """Folder with {train,valid,test}.jsonl[.gz]; the schedule g2p-en needs none."""
    task: Literal["qqp", "quasar-t", "wiki-auto", "custom"] = "qqp"
    """The task of the data, which has its published rows and its terms; g2p-en has its own."""
    terms: str = ""
    """The data's terms, for the card of any other task than qqp."""
    schedule: str = "gpu"
    """gpu, cpu, cpu-e2e, g2p-en or smoke."""
    rival: tuple[str, ...] = ()
    """g2p-en: folders of autoregressive models that stand in the table."""
    output_dir: str = ""
    """The run's folder; default: runs/release-TASK-SCHEDULE."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Of everything."""
    max_minutes: float = 0.0
    """Save and end with 75 after so many; 0: no limit."""
    rows: int = 0
    """Test rows of all systems; 0: all."""
    mbr_rows: int = 0
    """Test rows of the teacher's candidates; 0: all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left of the schedule; returns the exit code or raises a `DlmOneError`."""
    started = time.monotonic()
    args = parse(
        ReleaseArgs, prog="python -m dlmone_fast.release", description=DESCRIPTION, args=argv
    )
    _check_rows(args)
    from dlmone_fast.release.evaluation import Budget, better_student, evaluate_release, table
    from dlmone_fast.release.folder import TERMS, save_candidate, save_release
    from dlmone_fast.training import run

    config = release_config(args)
    if config.data.task == "g2p":
        return _release_g2p(config, args, started)
    terms = TERMS.get(config.data.task, "") or args.terms
    if not terms:
        raise UsageError(
            f"--terms: expected the terms of the data, which bound the weights, for task "
            f"{config.data.task!r}; got none. They are printed in the model card"
        )
    try:
        result = run(config, started=started)
        stage, temperature = better_student(result, _say)
        candidate = save_candidate(result, stage, temperature)
        budget = Budget(args.rows, args.mbr_rows)
        evaluation = evaluate_release(result, candidate, budget, _say)
    finally:
        _note_slice(config, started)
    folder = save_release(result, stage, temperature, args.schedule, evaluation, terms, _say)
    print(table(evaluation["rows"], config.data.task).markdown())
    _say(f"model folder: {folder}")
    return 0


def _release_g2p(config: Config, args: ReleaseArgs, started: float) -> int:
    from dlmone_fast.autoregressive import load_autoregressive
    from dlmone_fast.release.g2p_folder import release
    from dlmone_fast.training import run

    rivals = [load_autoregressive(folder) for folder in args.rival]
    try:
        result = run(config, started=started)
        folder, table = release(result, args.schedule, rivals, args.rows, _say)
    finally:
        _note_slice(config, started)
    print(table)
    _say(f"model folder: {folder}")
    return 0


def release_config(args: ReleaseArgs) -> Config:
    """The preset under the schedule's keys."""
    from dlmone_fast.config import from_dict, load_toml, merge, resolve, to_dict

    file = SCHEDULES / f"{args.schedule}.toml"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in SCHEDULES.glob("*.toml")))
        raise UsageError(f"--schedule: expected one of {known}, got {args.schedule!r}")
    keys = load_toml(file)
    config = from_dict(merge(to_dict(resolve(keys.pop("preset", PRESET))), keys))
    task = "g2p" if config.data.task == "g2p" else args.task
    return replace(
        config, data_dir=args.data_dir,
        output_dir=args.output_dir or f"runs/release-{task}-{args.schedule}",
        device=args.device, seed=args.seed, max_minutes=args.max_minutes,
        data=replace(config.data, task=task),
    )  # fmt: skip


def _check_rows(args: ReleaseArgs) -> None:
    for name in ("rows", "mbr_rows"):
        if getattr(args, name) < 0:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag}: expected 0 or more, got {getattr(args, name)}")


def _note_slice(config: Config, started: float) -> None:
    """One line of slices.jsonl: the device, and the minutes that this process took."""
    from dlmone_fast.models.devices import pick_device
    from dlmone_fast.release.environment import device_name

    root = Path(config.output_dir)
    if not root.is_dir():
        return
    line = {
        "device": device_name(pick_device(config.device)),
        "minutes": (time.monotonic() - started) / 60,
    }
    with (root / "slices.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
