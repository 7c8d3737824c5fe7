"""The paper's tables and figures, each by one command, with our results under its own.

    python -m benchmarks.paper --table 1 --run runs/qqp
    python -m benchmarks.paper --table 6 --teacher T --student S --data-dir DATA
    python -m benchmarks.paper --figure 4 --run runs/qqp --steps 10000 --every 1000 --plot 4.png

Tables: 1 single samples, 2 seconds a sample, 3 the two stages, 4 more calls of the student,
6 MBR of ten candidates. Figures: 2 quality over the number of MBR candidates, 3 over network
calls, 4 over the training of a third stage. Without data or weights the paper's rows are printed
with the reason why there are none of ours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.paper import figures, stage3, tables
from benchmarks.paper.figures import Say
from benchmarks.paper.lines import NOT_HERE, NOTHING_NAMED, named
from benchmarks.quality import plots
from benchmarks.quality.curves import Figure
from benchmarks.quality.frontier import check_counts
from benchmarks.quality.pairs import Pair, add_pair_options, open_pair
from dlmone_fast.cli import run_command
from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.table import Table
from dlmone_fast.samplers.grids import METHODS
from dlmone_fast.tasks import paper

_TABLES = {
    1: ("Table 1: one sample per source", tables.table_1),
    2: ("Table 2: seconds a sample", tables.table_2),
    3: ("Table 3: the two stages of distillation (paper: QQP)", tables.table_3),
    4: ("Table 4: more network calls with the one-step student (paper: QQP)", tables.table_4),
    6: ("Table 6: MBR of ten candidates", tables.table_6),
}
_FIGURES: dict[int, tuple[str, Callable[[Pair, argparse.Namespace, Say], Figure]]] = {
    2: ("Figure 2: quality over MBR candidates (paper: Wiki-Auto)", figures.figure_2),
    3: ("Figure 3: quality over network calls", figures.figure_3),
    4: ("Figure 4: quality over a third stage (paper: QQP)", stage3.figure_4),
}
_PUBLISHED = {2: paper.FIGURE_2, 3: paper.TABLE_1 + paper.TABLE_4[1:], 4: (paper.FIGURE_4_START,)}
_NOTES = {
    2: "paper: 1 and 10 candidates from Tables 1 and 6; its curves are not printed as numbers",
    3: "paper: the points of Tables 1 and 4, whose test rows are cut and decoded as DiffuSeq does; "
    "ours are whole, cut at [SEP]",
    4: f"paper: stage 2 of Table 3, where the third stage starts; {paper.FIGURE_4}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table or the data of a figure; the exit code."""
    options = _parser().parse_args(arguments)
    _check(options)
    print(f"{paper.PAPER}\n")
    if options.table is not None:
        title, make = _TABLES[options.table]
        print(f"{title}\n\n{make(options)}")
    else:
        print(_figure_text(options))
    return 0


def _figure_text(options: argparse.Namespace) -> str:
    title, measure = _FIGURES[options.figure]
    parts = [title, _published_table(options.figure).markdown(), _NOTES[options.figure]]
    if not named(options):
        return "\n\n".join([*parts, f"ours: not run: {NOTHING_NAMED}"])
    try:
        figure = measure(open_pair(options), options, lambda line: print(line, file=sys.stderr))
    except NOT_HERE as error:
        return "\n\n".join([*parts, f"ours: not run: {error}"])
    parts += [figure.table().markdown(), figure.note]
    if options.plot:
        plots.draw(figure, options.plot)
        parts.append(f"plot: {options.plot}")
    return "\n\n".join(parts)


def _published_table(number: int) -> Table:
    metrics = figures.SENTENCE_METRICS
    columns = ["task", "paper's system", "NFE", "candidates", *(m.title for m in metrics)]
    table = Table(columns, "ll" + "r" * (2 + len(metrics)))
    for row in _PUBLISHED[number]:
        cells = [f"{getattr(row, m.name):.4f}" for m in metrics]
        table.add(row.task, row.system, row.nfe, row.candidates, *cells)
    return table


def _check(options: argparse.Namespace) -> None:
    check_counts(options)
    if options.plot and options.figure is None:
        raise UsageError("--plot draws a figure; give --figure, or leave --plot out")
    for name in ("steps", "every", "output_dir"):
        value = getattr(options, name)
        if value is not None and options.figure != 4:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --figure 4")
    for name in ("steps", "every", "teacher_calls"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if options.plot:
        plots.check(options.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", type=int, choices=tuple(_TABLES))
    which.add_argument("--figure", type=int, choices=tuple(_FIGURES))
    add_pair_options(parser)
    add = parser.add_argument
    add("--rows", type=int, default=0, help="test rows; 0: all (default: %(default)s)")
    add("--candidates", type=int, default=3, help="texts a source (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the texts (default: %(default)s)")
    add("--teacher-sampler", default="ancestral", choices=METHODS,
        help="default: %(default)s, as the paper")  # fmt: skip
    add("--teacher-calls", type=int, help="network calls of the teacher; default: all T, as the "
        "paper")  # fmt: skip
    add("--full", action="store_true", help="long samplers on all rows, not on a part of them")
    add("--bertscore-model", metavar="DIR", help="local model folder for BERTScore")
    add("--bertscore-layer", type=int, help="its hidden layer; default: the last")
    add("--steps", type=int, help="figure 4: updates of θ; default: as many as stage 2's")
    add("--every", type=int, help="figure 4: steps between points; default: a tenth of them")
    add("--output-dir", type=Path, help="figure 4: where caches go; default: a temporary folder")
    add("--plot", type=Path, metavar="FILE.png", help="also draw the figure")
    return parser


if __name__ == "__main__":
    run_command(main)
