"""Pages and pictures: the newest figures of each operation, marked where they are stale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.generate import latency as latency_study
from benchmarks.harness import records, targets
from benchmarks.harness.records import Row, Score
from benchmarks.report import __main__ as report
from benchmarks.report import tables
from dlmone_fast.release.environment import SCHEMA, device_name

CPU = torch.device("cpu")
BUSY = "rounding", "128 tokens float32"


def record(rows: list[Row], date: str, **environment: Any) -> dict[str, Any]:
    found = records.record(CPU, {}, rows, [])
    found["environment"] |= {"date": f"{date}T00:00:00+00:00", **environment}
    return found


def every_kind() -> list[Row]:
    latency = [
        Row(latency_study.OPERATION, "BERT-base, batch 1", latency_study.named(system, steps),
            system != latency_study.PUBLISHED, steps * 9.0, at=steps, mean_ms=steps * 10.0)
        for steps in (1, 65, 2000)
        for system in ("dlmone_fast sampler eager fp32", latency_study.PUBLISHED)
    ]  # fmt: skip
    quality = [
        Row("quality: grammar", system, "dlmone_fast eager fp32", True, milliseconds, at=calls,
            scores={"joint": Score(0.9, 0.85, 0.95), "bleu": Score(0.5)}, rows_scored=8)
        for system, calls, milliseconds in (
            ("teacher, ddim", 2, 2.0), ("teacher, ddim", 20, 20.0), ("student", 1, 1.0),
            ("copy of the source", None, None),
        )
    ]  # fmt: skip
    scaling = [
        Row("generate by batch", f"compact, batch {n}", name, name.startswith("dlm"), 1.0 * n, at=n)
        for n in (1, 2, 4)
        for name in ("dlmone_fast eager fp32", "PyTorch fp32")
    ]
    kernel = Row(*BUSY, "dlmone_fast cpp", True, 2.0, fraction_of_floor=0.5)
    training = Row("training: teacher step", "compact, batch 8", "dlmone_fast", True, 100.0, at=8)
    return [*latency, *quality, *scaling, kernel, training]


def test_a_page_has_every_section_and_its_picture(tmp_path: Path, monkeypatch: Any):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    records.save(record(every_kind(), "2026-01-01"), tmp_path / "results")
    monkeypatch.setattr(report, "PAGES", tmp_path / "docs")
    (device,) = report.devices(tmp_path / "results")
    from benchmarks.report.plots import draw_all

    pictures = draw_all(device.rows, tmp_path / "docs")
    assert set(pictures) == {"latency", "frontier-grammar", "scaling", "roofline"}
    text = report.page(device, pictures)
    for heading in ("Seconds per sample", "Quality and speed", "Scaling", "Training", "Kernels"):
        assert f"## {heading}" in text
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.values())
    assert all(f"({name}.png)" in text for name in pictures)
    assert "0.900 ±0.050" in text
    # Eight rows in 100 ms.
    assert "80.0" in text


def test_the_index_links_every_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "results").mkdir()
    records.save(record([Row(*BUSY, "dlmone_fast cpp", True, 3.0)], "2026-01-01"),
                 tmp_path / "results")  # fmt: skip
    found = report.devices(tmp_path / "results")
    monkeypatch.setattr(report, "devices", lambda: found)
    monkeypatch.setattr(report, "PAGES", tmp_path)
    index, page = report.write(tmp_path)
    assert f"[{device_name(CPU)}]({page.name})" in index.read_text()


def test_the_newest_record_of_each_case_counts(tmp_path: Path):
    old = [Row(*BUSY, "dlmone_fast cpp", True, 9.0), Row("noise", "1", "dlmone_fast", True, 7.0)]
    for rows, date in (
        (old, "2026-01-01"),
        ([Row(*BUSY, "dlmone_fast cpp", True, 3.0)], "2026-02-01"),
    ):
        records.save(record(rows, date), tmp_path)
    (device,) = report.devices(tmp_path)
    assert {row.operation: row.median_ms for row in device.rows} == {"rounding": 3.0, "noise": 7.0}
    assert [used["environment"]["date"][:10] for used in device.used] == [
        "2026-02-01",
        "2026-01-01",
    ]


def test_a_whole_measurement_of_the_same_sources_counts_before_a_derived_one(tmp_path: Path):
    name = latency_study.named(latency_study.PUBLISHED, 2000)
    whole = Row(latency_study.OPERATION, "BERT-base, batch 1", name, False, 9.0, at=2000)
    derived = replace(whole, median_ms=7.0, derived="from 65 steps")
    target = {"target": "500 times", "value": 0.001, "outcome": "met"}
    for date, rows, outcome, sources in (
        ("2026-01-01", [whole], "met", "A"),
        ("2026-02-01", [derived], "met" + targets.DERIVED, "A"),
        ("2026-03-01", [replace(derived, median_ms=5.0)], "met" + targets.DERIVED, "B"),
    ):
        saved = record(rows, date, content_hash=sources)
        records.save({**saved, "targets": [{**target, "outcome": outcome}]}, tmp_path)
        (device,) = report.devices(tmp_path)
        expected = {"A": 9.0, "B": 5.0}[sources]
        assert [row.median_ms for row in device.rows] == [expected], date
        assert [t["outcome"] for t in device.targets()] == ["met" if sources == "A" else outcome]


def test_stale_and_older_records_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [Row(*BUSY, "dlmone_fast cpp", True, 3.0)]
    records.save(
        record(rows, "2026-01-01", content_hash="other", uncommitted_changes=True), tmp_path
    )
    (device,) = report.devices(tmp_path)
    text = report.page(device, {})
    assert "**Measured with uncommitted changes; measured on another version of the code.**" in text
    path = records.save(record(rows, "2026-03-01", schema=1), tmp_path)
    (device,) = report.devices(tmp_path)
    assert len(device.used) == 1
    assert f"{path.name}: left out" in capsys.readouterr().err


def test_targets_are_those_of_the_newest_record_that_measured_them():
    def judged(value: float | None) -> dict[str, Any]:
        return {"targets": [{"target": "fast", "value": value, "outcome": str(value)}]}

    device = report.Device("d", used=[judged(None), judged(2.0), judged(3.0)])
    assert [target["value"] for target in device.targets()] == [2.0]


def test_a_printed_record_keeps_every_number_of_calls(tmp_path: Path):
    path = records.save(record(every_kind(), "2026-01-01"), tmp_path)
    text = tables.markdown(json.loads(path.read_text()))
    lines = [line for line in text.splitlines() if line.startswith("| teacher, ddim")]
    assert [line.split("|")[2].strip() for line in lines] == ["2", "20"]


def test_tasks_have_pictures_of_their_own(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from benchmarks.report.plots import draw_all

    rows = [r for r in every_kind() if r.scores]
    other = [replace(r, operation="quality: qqp") for r in rows]
    assert set(draw_all([*rows, *other], tmp_path)) == {"frontier-grammar", "frontier-qqp"}


def test_the_command_prints_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = records.save(record([Row(*BUSY, "dlmone_fast cpp", True, 3.0)], "2026-01-01"), tmp_path)
    assert report.main([str(path)]) == 0
    assert "| dlmone_fast cpp |" in capsys.readouterr().out
    assert json.loads(path.read_text())["environment"]["schema"] == SCHEMA
