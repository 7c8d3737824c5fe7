"""The page of the reliability campaign shows what was measured, and says what was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import reliability
from dlmone_fast.errors import DataError

ENVIRONMENT = {
    "date": "2026-11-22T00:00:00+00:00", "cores": 2, "cpu": "a CPU", "python": "3.11.7",
    "torch": "2.13.0", "commit": "0123456789abcdef", "uncommitted_changes": False,
}  # fmt: skip


def written(tmp_path: Path, exit_status: int, **changes: Any) -> Path:
    figures = [
        {"number": number, "subject": "kills", "target": "50", "measured": f"{number}: 52"}
        for number in reliability.SUBJECTS
        if number not in ("R16", "R17")
    ]
    found = {"exit_status": exit_status, "campaign": True, "environment": ENVIRONMENT}
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({**found, "figures": figures, **changes}))
    return path


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nafter\n")
    monkeypatch.setattr(reliability, "PAGE", path)
    return path


def test_the_page_gets_the_figures_and_what_is_missing(tmp_path: Path, page: Path):
    assert reliability.main([str(written(tmp_path, 0))]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "R9: 52" in text
    assert text.index("R9: 52") < text.index("R10: 52")
    assert "commit 0123456789." in text
    assert "R16 (compute-sanitizer); R17 (poisoned GPU buffers)." in text
    assert "Reduced counts" not in text


def test_a_part_does_not_stand_for_its_number(tmp_path: Path, page: Path):
    path = written(tmp_path, 0)
    found = json.loads(path.read_text())
    found["figures"].append({**found["figures"][0], "number": "R17", "in_part": True})
    path.write_text(json.dumps(found))
    assert reliability.main([str(path)]) == 0
    text = page.read_text()
    assert "| R17 | kills" in text
    assert "R16 (compute-sanitizer); R17 (poisoned GPU buffers)." in text


def test_a_failed_campaign_leaves_the_page(tmp_path: Path, page: Path):
    assert reliability.main([str(written(tmp_path, 1))]) == 1
    assert "old" in page.read_text()


def test_reduced_counts_are_said(tmp_path: Path, page: Path):
    reliability.main([str(written(tmp_path, 0, campaign=False))])
    assert "Reduced counts" in page.read_text()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"exit_status": 0, "figures": [1]}'])
def test_another_file_is_refused(tmp_path: Path, page: Path, content: str):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"other\.json: expected the JSON"):
        reliability.main([str(path)])


def test_the_committed_page_has_its_marks_once():
    text = (reliability.records.ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert text.count("<!-- figures: begin -->") == text.count("<!-- figures: end -->") == 1
