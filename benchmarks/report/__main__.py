"""Reports of benchmark records: Markdown tables and pictures, `python -m benchmarks.report`.

For every device under benchmarks/results/, the newest figures of each case become a page and
its pictures in docs/benchmarks/, beside an index of the pages. A record that came from a dirty tree
or from other sources than this checkout's is marked. With records as arguments, prints them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.generate.latency import OPERATION
from benchmarks.harness import records
from benchmarks.harness.records import Row
from benchmarks.quality.tables import QUALITY, quality
from benchmarks.report import tables
from benchmarks.report.devices import Device, devices
from benchmarks.report.latency import decomposition, latency
from benchmarks.report.tables import markdown
from dlmone_fast.cli import run_command
from dlmone_fast.evaluation.table import Table

PAGES = records.ROOT / "docs" / "benchmarks"
_TRAINING, _SCALING = "training: ", "generate by "
_PICTURES = {
    "latency": "Seconds per sample against network calls",
    "frontier": "Quality against network calls and against time",
    "scaling": "Time of a call against what is varied",
    "roofline": "Share of what the machine can do",
}


def page(device: Device, pictures: dict[str, Path]) -> str:
    """The device's report."""
    sections = [
        (OPERATION, "Seconds per sample (the paper's Table 2)", _latency(device)),
        ("frontier", "Quality and speed", quality(device.of(QUALITY))),
        ("", "Whole calls beside other libraries", _cases(device, "generate")),
        ("", "Beside autoregressive models", tables.cases(device.of("generate beside"))),
        ("scaling", "Scaling", tables.cases(device.of(_SCALING))),
        ("", "Training steps", _training(device.of(_TRAINING))),
        ("roofline", "Kernels", _kernels(device)),
        ("", "Targets", tables.targets(device.targets()) if device.targets() else ""),
        ("", "How it was measured", _environments(device)),
    ]
    parts = [f"# Benchmarks: {device.title}", _INTRODUCTION]
    for picture, heading, text in sections:
        if text:
            drawn = [path for name, path in pictures.items() if name.partition("-")[0] == picture]
            shown = [f"![{_PICTURES[picture]}]({path.relative_to(PAGES)})" for path in drawn]
            parts.append("\n\n".join([f"## {heading}", *shown, text]))
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """\
Written by `python -m benchmarks.report` from the records under `benchmarks/results/`; nothing here
is typed by hand. Implementations of a case ran in turns in one process, after their results had
been checked; "× our time" is relative to the first of ours in the table. "Of floor"
is the least time that the bytes or products need on this machine over the median; on a CPU it is
reckoned in fp32, so that int8 may be faster."""


def _latency(device: Device) -> str:
    rows = device.of(OPERATION)
    parts = []
    for case in dict.fromkeys(row.case for row in rows):
        parts.append(f"**{case}**")
        parts.append(latency(rows, case))
        if chain := decomposition(rows, case):
            parts.append(f"Where the speed-up lies:\n\n{chain}")
    return "\n\n".join(parts)


def _cases(device: Device, operation: str) -> str:
    return tables.cases([row for row in device.rows if row.operation == operation])


def _kernels(device: Device) -> str:
    others = (OPERATION, QUALITY, _TRAINING, "generate")
    return tables.cases([row for row in device.rows if not row.operation.startswith(others)])


def _training(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    columns = ["step", "case", "implementation", "samples/s", "median ms", "p80 ms", "of floor",
               "peak MB", "× our time"]  # fmt: skip
    table, notes = Table(columns, "lll" + "r" * 6), []
    for row in rows:
        if row.median_ms is None:
            notes.append(f"- {row.operation.removeprefix(_TRAINING)}, {row.case}, "
                         f"{row.implementation}: {row.note}")  # fmt: skip
            continue
        own = records.first_of_ours(list(rows), row.operation, row.case)
        table.add(
            row.operation.removeprefix(_TRAINING), row.case, row.implementation,
            f"{1e3 * (row.at or 0) / row.median_ms:.1f}", f"{row.median_ms:.1f}",
            tables.number(row.p80_ms, ".1f"), tables.number(row.fraction_of_floor, ".0%"),
            tables.number(row.peak_bytes and row.peak_bytes / 1e6, ".0f"),
            tables.ratio(row.median_ms, own.median_ms if own else None),
        )  # fmt: skip
    return "\n\n".join(filter(None, [table.markdown(), "\n".join(dict.fromkeys(notes))]))


def _environments(device: Device) -> str:
    parts = []
    for record in device.used:
        operations = dict.fromkeys(row["operation"] for row in record["rows"])
        parts.append(f"{', '.join(operations)}:\n{tables.environment(record)}")
    return "\n\n".join(parts)


def write(folder: Path = PAGES) -> list[Path]:
    """Write every device's page and pictures; the paths of the pages."""
    written = []
    for device in devices():
        pictures = _drawn(device, folder / device.name)
        path = folder / f"{device.name}.md"
        path.write_text(page(device, pictures), encoding="utf-8")
        written.append(path)
    index = folder / "README.md"
    index.write_text(_index(written), encoding="utf-8")
    return [index, *written]


def _drawn(device: Device, folder: Path) -> dict[str, Path]:
    try:
        from benchmarks.report.plots import draw_all
    except ImportError as error:
        print(f"pages without pictures: {error}", file=sys.stderr)
        return {}
    return draw_all(device.rows, folder)


def _index(pages: Sequence[Path]) -> str:
    links = "\n".join(f"- [{_title(path)}]({path.name})" for path in pages)
    return f"{_INDEX}\n{links}\n"


def _title(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("# Benchmarks: ")


_INDEX = """\
# Benchmarks

    make bench                # all that takes seconds, then these pages; BENCH=--full: the rest
    python -m benchmarks.frontier --run runs/demo --save-records    # quality of a trained pair
    python -m benchmarks.report                                     # these pages from the records
    python -m benchmarks.paper --table 1 --run runs/qqp             # the paper's tables and figures
    python -m benchmarks.gpu_session kernels                        # on a machine with a GPU

A result is checked before its time is taken: fp32 must give the ids of fp32 in PyTorch but for near
ties, and a lower precision the tokens of fp32 on a trained student (bf16 99.5 %, int8 98 %).
Autoregressive models have random weights, and must choose what their own scores in fp32 choose, or
nearly; their rows say how often. Peers are named with what is missing where they cannot run.

Machines:
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or print the records named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("records", nargs="*", type=Path, metavar="RECORD.json")
    given = parser.parse_args(arguments).records
    for path in given:
        print(markdown(json.loads(path.read_text(encoding="utf-8"))))
    if not given:
        for path in write():
            print(path.relative_to(records.ROOT))
    return 0


if __name__ == "__main__":
    run_command(main)
