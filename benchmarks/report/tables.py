"""Benchmark rows as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.records import Row, caveat, first_of_ours, rows_of
from benchmarks.quality.tables import QUALITY, quality
from dlmone_fast.evaluation.table import Table

_COLUMNS = (
    "implementation", "median ms", "p20 ms", "p80 ms", "p99 ms", "of floor", "GB/s", "TFLOP/s",
    "peak MB", "held MB", "× our time", "× our memory", "of its call", "tokens as fp32",
    "trained model's tokens", "output error", "samples",
)  # fmt: skip


def markdown(record: dict[str, Any]) -> str:
    """A whole record: environment, one table a case, and the targets."""
    rows = rows_of(record)
    scored = [row for row in rows if row.operation.startswith(QUALITY)]
    timed = [row for row in rows if not row.operation.startswith(QUALITY)]
    parts = [environment(record), *filter(None, [cases(timed), quality(scored)])]
    return "\n\n".join([*parts, *([targets(record["targets"])] if record["targets"] else [])])


def environment(record: Mapping[str, Any]) -> str:
    """A record's device, date and versions, and the reasons to doubt its figures."""
    found, machine = record["environment"], record["machine"]
    versions = {"torch": found["torch"], "CUDA": found["cuda"], "triton": found["triton"],
                **found["libraries"]}  # fmt: skip
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    clock = f" at {found['cpu_mhz']:.0f} MHz" if found["cpu_mhz"] else ""
    lines = [
        f"{found['device']} (CPU {found['cpu']}{clock}, {found['cores']} cores), "
        f"{found['threads']} threads, load average {found['load_average']:.2f}; Python "
        f"{found['python']}, {named}; dlmone_fast {found['dlmone_fast']}, commit "
        f"{str(found['commit'])[:9]}, {found['date']}."
    ]
    if found["gpu"]:
        lines.append(", ".join(f"{name} {value}" for name, value in found["gpu"].items()) + ".")
    if machine:
        lines.append(
            f"Copy {machine['copy_gb_s']:.0f} GB/s measured. Floors: "
            f"{machine['bandwidth_gb_s']:.0f} GB/s, fp32 {machine['fp32_tflop_s']:.3g} and bf16 "
            f"{machine['bf16_tflop_s']:.3g} TFLOP/s ({machine['source']})."
        )
    if warning := caveat(record):
        lines.append(f"**{warning[0].upper()}{warning[1:]}.**")
    return "\n".join(lines)


def cases(rows: Sequence[Row]) -> str:
    """One table for each operation and case, in the order of the rows."""
    found = list(dict.fromkeys((row.operation, row.case) for row in rows))
    return "\n\n".join(case(rows, *each) for each in found)


def case(rows: Sequence[Row], operation: str, name: str) -> str:
    """All implementations of a case; a column where no row has a value is left out."""
    found = [row for row in rows if (row.operation, row.case) == (operation, name)]
    own = first_of_ours(list(rows), operation, name)
    timed = {row.implementation: _cells(row, found, own) for row in found if row.median_ms}
    kept = [i for i in range(len(_COLUMNS) - 1) if any(cells[i] for cells in timed.values())]
    table = Table([_COLUMNS[0], *(_COLUMNS[i + 1] for i in kept)])
    for implementation, cells in timed.items():
        table.add(implementation, *(cells[i] for i in kept))
    notes = [f"- {row.implementation}: {row.note}" for row in found if row.note]
    notes += [f"- {row.implementation}: {row.derived}" for row in found if row.derived]
    parts = [f"**{operation}, {name}**", table.markdown() if timed else "", "\n".join(notes)]
    return "\n\n".join(filter(None, parts))


def targets(judged: Sequence[Mapping[str, Any]]) -> str:
    """Targets beside what was measured."""
    table = Table(["target", "measured", "outcome"], "lrl")
    for target in judged:
        table.add(target["target"], number(target["value"], ".3g"), target["outcome"])
    return table.markdown()


def number(value: float | None, form: str) -> str | None:
    """The value in a format; None stays None, which a table shows as a dash."""
    return None if value is None else format(value, form)


def ratio(theirs: float | None, ours: float | None, form: str = ".2f") -> str | None:
    """Theirs over ours."""
    return format(theirs / ours, form) if theirs is not None and ours else None


def _cells(row: Row, found: Sequence[Row], own: Row | None) -> list[str | None]:
    return [
        number(row.median_ms, ".4g" if row.derived else ".3f"),
        number(row.p20_ms, ".3f"),
        number(row.p80_ms, ".3f"),
        number(row.p99_ms, ".3f"),
        number(row.fraction_of_floor, ".0%"),
        number(row.gigabytes_per_second, ".1f"),
        number(row.teraflops, ".3g"),
        _megabytes(row.peak_bytes),
        _megabytes(row.held_bytes),
        ratio(row.median_ms, own.median_ms if own else None),
        ratio(row.peak_bytes, own.peak_bytes if own else None),
        number(_share(row, found, own), ".1%"),
        number(row.agreement, ".2%"),
        number(row.trained_agreement, ".2%"),
        number(row.error, ".2g"),
        str(row.samples) if row.samples else None,
    ]


def _megabytes(value: int | None) -> str | None:
    return None if value is None else f"{value / 1e6:.1f}"


def _share(row: Row, found: Sequence[Row], own: Row | None) -> float | None:
    """A part's share of the call that it is named after, or of our first one."""
    named = (
        r for r in found if not r.part and row.implementation.startswith(f"{r.implementation},")
    )
    whole = next(named, own)
    if not row.part or row.median_ms is None or whole is None or not whole.median_ms:
        return None
    return row.median_ms / whole.median_ms
