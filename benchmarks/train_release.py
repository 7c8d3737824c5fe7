"""From data to a released student, in slices: teacher, pairs, two stages, evaluation, model folder.

    python -m benchmarks.train_release --data-dir DATA --schedule gpu --max-minutes 8

The same command again continues a run that stopped after its minutes, was killed, or moved to
another machine with its folder. A schedule is the preset `qqp-small` with the keys of
benchmarks/schedules/SCHEDULE.toml over it. The run's folder gets `release/`: the student that is
better on the validation split, in bf16, with its evaluation on the test split, what it has cost
(device, minutes and rows of each phase) and its card.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.release_evaluation import Budget, better_student, evaluate_release
from benchmarks.release_folder import add_card, save_weights
from dlmone_fast.cli import run_command
from dlmone_fast.config import Config, from_dict, load_toml, merge, resolve, to_dict
from dlmone_fast.errors import UsageError
from dlmone_fast.training import RunResult, run

PRESET = "qqp-small"
SCHEDULES = Path(__file__).parent / "schedules"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left of the schedule; the exit code."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    config = release_config(options)
    result = train(config, started)
    result.workspace.limit.check("the evaluation")
    stage = better_student(result, _say)
    folder = save_weights(result, stage)
    evaluation, table = evaluate_release(result, folder, Budget.of(options), _say)
    add_card(result, stage, options.schedule, evaluation, table)
    print(table)
    _say(f"model folder: {folder}")
    return 0


def release_config(options: argparse.Namespace) -> Config:
    """The preset under the schedule's keys, for a data folder of any task."""
    file = SCHEDULES / f"{options.schedule}.toml"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in SCHEDULES.glob("*.toml")))
        raise UsageError(f"--schedule: expected one of {known}, got {options.schedule!r}")
    config = from_dict(merge(to_dict(resolve(PRESET)), load_toml(file)))
    name = Path(options.data_dir).resolve().name
    task = name if name in ("qqp", "quasar-t", "wiki-auto") else "custom"
    output = options.output_dir or f"runs/{options.schedule}-{name}"
    return replace(
        config, data_dir=options.data_dir, output_dir=output, device=options.device,
        seed=options.seed, max_minutes=options.max_minutes, data=replace(config.data, task=task),
    )  # fmt: skip


def train(config: Config, started: float) -> RunResult:
    """Every phase in turn."""
    phases = ["teacher", "pairs", "stage1", "stage2"]
    if not config.distill.pairs.count:
        phases.remove("pairs")
    for phase in phases:
        _say(f"{phase} …")
        result = run(config, phase, started=started)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_release", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--data-dir", required=True, help="folder with {train,valid,test}.jsonl[.gz]")
    add("--schedule", default="gpu", help="a file of benchmarks/schedules (default: %(default)s)")
    add("--output-dir", default="", help="the run's folder (default: runs/SCHEDULE-DATA)")
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
