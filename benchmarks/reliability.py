"""The reliability campaign's page, `python -m benchmarks.reliability FIGURES`.

FIGURES is what `pytest tests/reliability --figures FIGURES` wrote. Prints one table of figure,
target and measurement, and puts it into docs/reliability.md, between its two marks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import records
from benchmarks.harness.sections import replace_section, where_measured
from dlmone_fast.cli import run_command
from dlmone_fast.errors import DataError
from dlmone_fast.evaluation.table import Table

PAGE = records.ROOT / "docs" / "reliability.md"
# Subjects of the campaign; a number without a figure is reported as missing.
SUBJECTS = {
    "R1": "training killed at random moments",
    "R2": "killed inside a save",
    "R3": "damaged checkpoints and model folders",
    "R4": "disk full, read-only, permission denied",
    "R5": "signals",
    "R6": "values that are not finite",
    "R7": "the same run twice",
    "R8": "golden losses",
    "R9": "answers in any company",
    "R10": "threads",
    "R11": "hostile prompts",
    "R12": "special tokens in text",
    "R13": "WordPiece beside the tokenizers library's",
    "R14": "fuzzed files",
    "R15": "native code",
    "R16": "compute-sanitizer",
    "R17": "poisoned GPU buffers",
    "R18": "soak",
    "R19": "load and unload",
    "R20": "GPU out of memory",
    "R21": "overload",
    "R22": "installation without compiler, triton and network",
    "R23": "no network",
    "R24": "no pickle",
    "R25": "malicious checkpoints",
    "R26": "--help and a typo",
    "R27": "mutated configurations",
    "R28": "error messages",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print the table; 1, and no page, if the campaign did not pass."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("figures", type=Path, help="JSON of pytest's --figures")
    options = parser.parse_args(arguments)
    try:
        found = json.loads(options.figures.read_text(encoding="utf-8"))
        section, passed = figures_section(found), found["exit_status"] == 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{options.figures}: expected the JSON that `pytest tests/reliability --figures FILE` "
            f"writes, got {error!r}; run it again"
        ) from error
    if passed:
        replace_section(PAGE, "figures", section)
    print(section)
    if not passed:
        print("\nThe campaign did not pass; the page stays as it is.")
    return int(not passed)


def figures_section(found: Mapping[str, Any]) -> str:
    """The section of the page: machine, table, and the subjects that were not measured."""
    figures, environment = found["figures"], found["environment"]
    table = Table(["", "subject", "target", "measured"], align="llll")
    for row in sorted(figures, key=lambda row: (_order(row["number"]), row["subject"])):
        table.add(row["number"], row["subject"], row["target"], row["measured"])
    # A row that measures a part, such as interpreted kernels, does not stand for its number.
    missing = SUBJECTS.keys() - {row["number"] for row in figures if not row.get("in_part")}
    counts = "" if found["campaign"] else " Reduced counts: for the full ones, `make reliability`."
    lines = [where_measured(environment) + counts, "", table.markdown()]
    if missing:
        named = "; ".join(f"{n} ({SUBJECTS[n]})" for n in sorted(missing, key=_order))
        lines += ["", f"Not measured in this run: {named}."]
    return "\n".join(lines)


def _order(number: str) -> int:
    return int(number.removeprefix("R"))


if __name__ == "__main__":
    run_command(main)
