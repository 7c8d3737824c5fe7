"""The newest figures of each device, from all of its records."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import records
from benchmarks.harness.records import Row, rows_of
from benchmarks.harness.targets import DERIVED
from dlmone_fast.release.environment import SCHEMA


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
    """The newest figures of each device; records of an older schema are named on stderr."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        read = [_read(record) for record in sorted(path.glob("*.json"), reverse=True)]
        device = _newest(path.name, [record for record in read if record is not None])
        if device.rows:
            found.append(device)
    return found


def _read(path: Path) -> dict[str, Any] | None:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record["environment"].get("schema") != SCHEMA:
        print(f"{path.name}: left out, of another schema than {SCHEMA}", file=sys.stderr)
        return None
    return record


def _is_surer(
    record: dict[str, Any],
    target: dict[str, Any],
    newer: dict[str, Any],
    known: dict[str, Any],
) -> bool:
    """True if an older record's judgement of a target holds rather than the newer one's."""
    if target["value"] is None:
        return False
    derived = DERIVED in known["outcome"] and DERIVED not in target["outcome"]
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
