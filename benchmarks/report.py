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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import latency_study, latency_tables, records, tables, targets
from benchmarks.quality_tables import QUALITY, quality
from benchmarks.records import Row, rows_of
from benchmarks.tables import markdown
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


@dataclass
class Device:
    """The newest figures of one device.

    Attributes:
        name: of the folder of its records.
        rows: of each operation and case, those of the newest record that has it, or of an older
            one of the same sources that measured what this one derived.
        used: the records that rows came from, newest first.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    used: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The device's own name."""
        found: str = self.used[0]["environment"]["device"]
        return found

    def of(self, prefix: str) -> list[Row]:
        """Rows whose operation begins so."""
        return [row for row in self.rows if row.operation.startswith(prefix)]

    def targets(self) -> list[dict[str, Any]]:
        """Each target once, as the newest record judged it where it was measured; a measurement
        of the same sources comes before what was derived."""
        found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for record in self.used:
            for target in record["targets"]:
                name = target["target"]
                if name not in found or _is_surer(record, target, *found[name]):
                    found[name] = record, target
        return [target for _, target in found.values()]


def devices(folder: Path = records.RESULTS) -> list[Device]:
    """What the records of each device say; records of an older schema are named on stderr."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        read = [_read(record) for record in sorted(path.glob("*.json"), reverse=True)]
        device = _newest(path.name, [record for record in read if record is not None])
        if device.rows:
            found.append(device)
    return found


def _read(path: Path) -> dict[str, Any] | None:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record["environment"].get("schema") != records.SCHEMA:
        print(f"{path.name}: left out, of another schema than {records.SCHEMA}", file=sys.stderr)
        return None
    return record


def _is_surer(
    record: dict[str, Any],
    target: dict[str, Any],
    newer: dict[str, Any],
    known: dict[str, Any],
) -> bool:
    """Whether an older record's judgement of a target holds rather than the newer one's."""
    if target["value"] is None:
        return False
    derived = targets.DERIVED in known["outcome"] and targets.DERIVED not in target["outcome"]
    return known["value"] is None or (derived and _same_sources(record, newer))


def _newest(name: str, found: Sequence[dict[str, Any]]) -> Device:
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for record in found:
        for key in {(row.operation, row.case) for row in rows_of(record)}:
            newer = chosen.setdefault(key, record)
            if _same_sources(newer, record) and _derived(newer, key) & _measured(record, key):
                chosen[key] = record
    device = Device(name)
    for record in found:
        rows = [row for row in rows_of(record) if chosen[row.operation, row.case] is record]
        if rows:
            device.rows += rows
            device.used.append(record)
    return device


def _derived(record: dict[str, Any], key: tuple[str, str]) -> set[str]:
    return {r.implementation for r in rows_of(record) if (r.operation, r.case) == key and r.derived}


def _measured(record: dict[str, Any], key: tuple[str, str]) -> set[str]:
    found = [row for row in rows_of(record) if (row.operation, row.case) == key]
    return {row.implementation for row in found if row.median_ms is not None and not row.derived}


def _same_sources(first: dict[str, Any], second: dict[str, Any]) -> bool:
    found = {record["environment"].get("content_hash") for record in (first, second)}
    return len(found) == 1 and None not in found


def page(device: Device, pictures: dict[str, Path]) -> str:
    """The device's report."""
    sections = [
        (latency_study.OPERATION, "Seconds per sample (the paper's Table 2)", _latency(device)),
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
    rows = device.of(latency_study.OPERATION)
    parts = []
    for case in dict.fromkeys(row.case for row in rows):
        parts.append(f"**{case}**")
        parts.append(latency_tables.latency(rows, case))
        if chain := latency_tables.decomposition(rows, case):
            parts.append(f"Where the speed-up lies:\n\n{chain}")
    return "\n\n".join(parts)


def _cases(device: Device, operation: str) -> str:
    return tables.cases([row for row in device.rows if row.operation == operation])


def _kernels(device: Device) -> str:
    others = (latency_study.OPERATION, QUALITY, _TRAINING, "generate")
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
        from benchmarks.plots import draw_all
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
