"""From data to a released student, in slices: teacher, pairs, two stages, evaluation, model folder.

    python -m benchmarks.train_release --data-dir DATA --schedule gpu --max-minutes 8

The same command again continues a run that stopped after its minutes, was killed, or moved to
another machine with its folder; the evaluation too, system by system. A schedule is the preset
`qqp-small` with the keys of benchmarks/schedules/SCHEDULE.toml over it. The run's folder gets
`release/`: the student that is better on the validation split, in bf16, with its evaluation on the
test split, what it has cost (devices, minutes and rows of each phase) and its card.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.records import device_name
from benchmarks.release_data import TERMS
from benchmarks.release_evaluation import (
    Budget,
    better_student,
    evaluate_release,
    table,
)
from benchmarks.release_folder import save_candidate, save_release
from dlmone_fast.cli import run_command
from dlmone_fast.config import Config, from_dict, load_toml, merge, resolve, to_dict
from dlmone_fast.errors import UsageError
from dlmone_fast.runtime.loading import pick_device
from dlmone_fast.training import run

PRESET = "qqp-small"
SCHEDULES = Path(__file__).parent / "schedules"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left of the schedule; the exit code."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    config = release_config(options)
    terms = TERMS.get(config.data.task, "") or options.terms
    if not terms:
        raise UsageError(
            f"--terms: expected the terms of the data, which bound the weights, for task "
            f"{config.data.task!r}; got none. They are printed in the model card"
        )
    budget = Budget.of(options)
    try:
        result = run(config, started=started)
        stage, temperature = better_student(result, _say)
        candidate = save_candidate(result, stage, temperature)
        evaluation = evaluate_release(result, candidate, budget, _say)
    finally:
        _note_slice(config, started)
    folder = save_release(result, stage, temperature, options.schedule, evaluation, terms, _say)
    print(table(evaluation["rows"], config.data.task).markdown())
    _say(f"model folder: {folder}")
    return 0


def release_config(options: argparse.Namespace) -> Config:
    """The preset under the schedule's keys."""
    file = SCHEDULES / f"{options.schedule}.toml"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in SCHEDULES.glob("*.toml")))
        raise UsageError(f"--schedule: expected one of {known}, got {options.schedule!r}")
    config = from_dict(merge(to_dict(resolve(PRESET)), load_toml(file)))
    return replace(
        config, data_dir=options.data_dir,
        output_dir=options.output_dir or f"runs/release-{options.task}-{options.schedule}",
        device=options.device, seed=options.seed, max_minutes=options.max_minutes,
        data=replace(config.data, task=options.task),
    )  # fmt: skip


def _note_slice(config: Config, started: float) -> None:
    """One line of slices.jsonl: on which device, and for how long."""
    root = Path(config.output_dir)
    if not root.is_dir():
        return
    line = {
        "device": device_name(pick_device(config.device)),
        "minutes": (time.monotonic() - started) / 60,
    }
    with (root / "slices.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_release", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--data-dir", required=True, help="folder with {train,valid,test}.jsonl[.gz]")
    add(
        "--task",
        default="qqp",
        choices=("qqp", "quasar-t", "wiki-auto", "custom"),
        help="what the data is: whose published rows and terms go with it (default: %(default)s)",
    )
    add("--terms", default="", help="the data's terms, for the card of any other task than qqp")
    add("--schedule", default="gpu", help="a file of benchmarks/schedules (default: %(default)s)")
    add("--output-dir", default="", help="the run's folder (default: runs/release-TASK-SCHEDULE)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    add("--max-minutes", type=float, default=0.0,
        help="save and end with 75 after so many; 0: no limit (default)")  # fmt: skip
    Budget.add_options(parser)
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
