"""A step that fails, hangs or is missing stops none of the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_session import PARTS, Step, run_all, steps


def python(name: str, code: str, limit: int = 30, leave: int = 0) -> Step:
    return Step(name, [sys.executable, "-c", code], limit, leave)


def test_every_step_has_its_chance(tmp_path: Path):
    found = [
        Step("missing", ["/no/such/program"], 10),
        python("fails", "print('so it is'); raise SystemExit(3)"),
        python("hangs", "import time; time.sleep(60)", limit=1),
        python("greedy", "", leave=1000),
        python("last", "import dlmone_fast; print(dlmone_fast.__file__)"),
    ]
    outcomes = run_all(found, tmp_path, seconds=60)
    assert [outcome.exit_code for outcome in outcomes] == [None, 3, None, None, 0]
    assert outcomes[2].note == "cut off after 1 s"
    assert outcomes[3].note == "no time was left for it"
    assert (tmp_path / "fails.log").read_text() == "so it is\n"
    root = Path(__file__).resolve().parents[2]
    assert (tmp_path / "last.log").read_text().startswith(str(root))
    assert [row["name"] for row in json.loads((tmp_path / "summary.json").read_text())] == [
        step.name for step in found
    ]


@pytest.mark.parametrize("part", sorted(PARTS))
def test_the_limits_leave_time_for_the_benchmarks(tmp_path: Path, part: str):
    found = steps(tmp_path, part)
    assert found[-1].name == part
    assert all(step.leave >= 240 for step in found[:-1])


@pytest.mark.parametrize("part", sorted(PARTS))
def test_every_part_has_tests_and_benchmarks(part: str):
    root = Path(__file__).resolve().parents[2]
    assert all((root / path).exists() for path in PARTS[part])
