"""A benchmark record as Markdown tables: `python -m benchmarks.report RECORD.json`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import Row, first_of_ours, rows_of
from dlmone_fast.evaluation.table import Table

_COLUMNS = ["implementation", "median ms", "p99 ms", "min ms", "GB/s", "TFLOP/s", "of floor",
            "peak MB", "× our time", "× our memory", "samples"]  # fmt: skip
_CALL_COLUMNS = ["of its call", "tokens as fp32", "output error", "held MB"]


def markdown(record: dict[str, Any]) -> str:
    """Environment, one table a case, and the targets."""
    rows = rows_of(record)
    cases = list(dict.fromkeys((row.operation, row.case) for row in rows))
    parts = [_environment(record)]
    parts += [_case(rows, operation, case) for operation, case in cases]
    if record["targets"]:
        parts.append(_targets(record["targets"]))
    return "\n\n".join(parts)


def _environment(record: dict[str, Any]) -> str:
    found, machine = record["environment"], record["machine"]
    changes = " with uncommitted changes" if found["uncommitted_changes"] else ""
    return (
        f"{found['device']} (CPU {found['cpu']}), {found['threads']} threads, load average "
        f"{found['load_average']:.2f}; Python {found['python']}, torch {found['torch']}, triton "
        f"{found['triton']}{_libraries(found)}, commit {str(found['commit'])[:9]}{changes}, "
        f"{found['date']}.\n"
        f"Copy {machine['copy_gb_s']:.0f} GB/s measured. Floors: {machine['bandwidth_gb_s']:.0f} "
        f"GB/s, fp32 {machine['fp32_tflop_s']:.3g} and bf16 {machine['bf16_tflop_s']:.3g} "
        f"TFLOP/s ({machine['source']})."
    )


def _libraries(found: dict[str, Any]) -> str:
    versions = found.get("libraries", {}).items()
    return "".join(f", {name} {version}" for name, version in versions if version)


def _case(rows: list[Row], operation: str, case: str) -> str:
    found = [row for row in rows if (row.operation, row.case) == (operation, case)]
    of_calls = any(row.agreement is not None for row in found)
    table = Table(_COLUMNS + (_CALL_COLUMNS if of_calls else []))
    own = first_of_ours(rows, operation, case)
    for row in found:
        if row.median_ms is not None:
            more = _call_cells(row, found, own) if of_calls else []
            table.add(row.implementation, *_cells(row, own), *more)
    notes = [f"- {row.implementation}: {row.note}" for row in found if row.median_ms is None]
    parts = [f"**{operation}, {case}**", table.markdown(), "\n".join(notes)]
    return "\n\n".join(filter(None, parts))


def _cells(row: Row, own: Row | None) -> list[str | int | None]:
    peak = None if row.peak_bytes is None else row.peak_bytes / 1e6
    return [
        _number(row.median_ms, ".3f"),
        _number(row.p99_ms, ".3f"),
        _number(row.min_ms, ".3f"),
        _number(row.gigabytes_per_second, ".1f"),
        _number(row.teraflops, ".3g"),
        _number(row.fraction_of_floor, ".0%"),
        _number(peak, ".1f"),
        _ratio(row.median_ms, own.median_ms if own else None),
        _ratio(row.peak_bytes, own.peak_bytes if own else None),
        row.samples,
    ]


def _call_cells(row: Row, found: list[Row], own: Row | None) -> list[str | None]:
    accuracy = [_number(row.agreement, ".2%"), _number(row.error, ".2g")]
    held = None if row.held_bytes is None else row.held_bytes / 1e6
    return [_number(_share(row, found, own), ".1%"), *accuracy, _number(held, ".1f")]


def _share(row: Row, found: list[Row], own: Row | None) -> float | None:
    """A part's share of the call that it is named after, or of our first one."""
    named = (
        r for r in found if not r.part and row.implementation.startswith(f"{r.implementation},")
    )
    whole = next(named, own)
    if not row.part or row.median_ms is None or whole is None or not whole.median_ms:
        return None
    return row.median_ms / whole.median_ms


def _targets(targets: list[dict[str, Any]]) -> str:
    table = Table(["target", "measured", "outcome"], "lrl")
    for target in targets:
        table.add(target["target"], _number(target["value"], ".3g"), target["outcome"])
    return table.markdown()


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _ratio(theirs: float | None, ours: float | None) -> str | None:
    return f"{theirs / ours:.2f}" if theirs is not None and ours else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the records given on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD.json")
    for path in parser.parse_args(arguments).records:
        print(markdown(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
