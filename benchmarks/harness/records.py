"""Records of benchmark runs: rows, the environment they were measured in, and the JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dlmone_fast.release.environment import content_hash, environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

# A share of the cores: what an idle desktop has.
_IDLE_LOAD = 0.5


@dataclass(frozen=True)
class Score:
    """A measure of quality with its 95 % interval, None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One implementation on one shape.

    Times are None where nothing was timed, and `note` says why; memory is what the call needs
    beyond its inputs. `ours` marks this package's backends, the preferred one of a case first. A
    percentile is the least time that so many per cent of the samples do not exceed: p99 is the
    longest one, where there are fewer than 100. `warmup` calls came before the samples and do not
    count. `derived` says how a time was computed that was not measured as a whole; "": it was.

    Of whole calls of `generate` also: `part`, the part of a call that the row is about ("" for all
    of it); `agreement`, the share of tokens that are those of fp32 on the same noise, and
    `trained_agreement`, the same of a trained model's answers; `error`, of a network's output, root
    of mean squares relative to fp32; `held_bytes`, GPU memory that is kept between calls, beyond
    the model's; `at`, the abscissa of a plot (a batch, a number of network calls); `scores`,
    quality by the name of its measure, of `rows_scored` samples.
    """

    operation: str
    case: str
    implementation: str
    ours: bool
    median_ms: float | None = None
    min_ms: float | None = None
    samples: int = 0
    gigabytes_per_second: float | None = None
    teraflops: float | None = None
    fraction_of_floor: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    p99_ms: float | None = None
    part: str = ""
    agreement: float | None = None
    error: float | None = None
    held_bytes: int | None = None
    at: float | None = None
    shape: str = ""
    dtype: str = ""
    warmup: int = 0
    mean_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    floor_ms: float | None = None
    derived: str = ""
    trained_agreement: float | None = None
    scores: Mapping[str, Score] | None = None
    rows_scored: int = 0


def find(rows: list[Row], operation: str, case: str, implementation: str) -> Row | None:
    """The row of an implementation, if it was measured."""
    key = (operation, case, implementation)
    return next((r for r in rows if (r.operation, r.case, r.implementation) == key), None)


def first_of_ours(rows: list[Row], operation: str, case: str) -> Row | None:
    """The row of the backend that comes first in our order of preference."""
    own = [r for r in rows if (r.operation, r.case) == (operation, case) and r.ours]
    return own[0] if own else None


def caveat(record: Mapping[str, Any], tree: str | None = None) -> str:
    """Reasons to doubt a record's figures, in one sentence; "": none.

    Args:
        tree: the content hash to compare with; None: that of this checkout.
    """
    found = record["environment"]
    said = []
    if found["uncommitted_changes"]:
        said.append("measured with uncommitted changes")
    if found["content_hash"] != (tree or content_hash()):
        said.append("measured on another version of the code")
    if (load := found.get("load_at_start")) is not None and load > _IDLE_LOAD * found["cores"]:
        said.append(f"measured beside other work (load average {load:.1f} at the start)")
    return "; ".join(said)


def save(record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a record to `folder`/<device>/<date>-<commit>.json and return its path."""
    found = record["environment"]
    date = re.sub(r"[^0-9T]", "", found["date"][:19])
    name = f"{date}-{(found['commit'] or 'unknown')[:9]}.json"
    path = folder / _folder_name(found["device"]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def record(
    device: torch.device,
    machine: dict[str, Any],
    rows: list[Row],
    targets: list[dict[str, Any]],
    load_at_start: float | None = None,
) -> dict[str, Any]:
    """A run's results, ready for JSON."""
    return {
        "environment": environment(device, load_at_start),
        "machine": machine,
        "rows": [asdict(row) for row in rows],
        "targets": targets,
    }


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """The rows of a record that was read back."""
    return [_row(dict(fields)) for fields in record["rows"]]


def _row(fields: dict[str, Any]) -> Row:
    if fields.get("scores") is not None:
        fields["scores"] = {name: Score(**score) for name, score in fields["scores"].items()}
    return Row(**fields)


def _folder_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
