"""Records are written, read back and shown, with the reasons to doubt them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.harness import records
from benchmarks.harness.floors import Machine, Work
from benchmarks.harness.records import Row, Score
from benchmarks.harness.targets import Target, judge
from benchmarks.report import tables

ROUNDING = ("rounding", "128 tokens float32")
ROWS = [
    Row(*ROUNDING, "dlmone_fast cpp", True, 4.0, 4.0, 5, peak_bytes=10),
    Row(*ROUNDING, "dlmone_fast torch", True, 99.0, 99.0, 5, peak_bytes=99),
    Row(*ROUNDING, "matmul + argmin", False, 10.0, 10.0, 5, peak_bytes=500),
]


def test_a_floor_is_the_slower_of_moving_and_computing():
    machine = Machine(bandwidth=1e9, copy=5e8, fp32=1e9, bf16=4e9, source="made up")
    assert machine.floor_seconds(Work(bytes=2_000_000_000, flops=1_000)) == 2.0
    assert machine.floor_seconds(Work(bytes=0, flops=8_000_000_000)) == 8.0
    assert machine.floor_seconds(Work(bytes=0, flops=8_000_000_000, precision="bf16")) == 2.0


def test_a_record_is_written_and_reads_back_as_a_report(tmp_path: Path):
    cpu = torch.device("cpu")
    machine = Machine(1e10, 1e10, 1e12, 2e12, "measured").record()
    judged = judge(ROWS, "cpu", 1e10, [Target("cpu", *ROUNDING, "time", 0.5, "matmul + argmin")])
    wrong = Row(*ROUNDING, "other", False, note="wrong, so not timed: 1 of 128 ids differ")
    path = records.save(records.record(cpu, machine, [*ROWS, wrong], judged), tmp_path)
    assert path.parent.parent == tmp_path
    read = json.loads(path.read_text())
    assert {"date", "device", "cpu", "threads", "python", "torch", "triton", "dlmone_fast",
            "commit", "uncommitted_changes"} <= set(read["environment"])  # fmt: skip
    assert records.rows_of(read) == [*ROWS, wrong]
    text = tables.markdown(read)
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| implementation")).split("|")
    peer = next(line for line in lines if line.startswith("| matmul + argmin")).split("|")
    cells = {name.strip(): cell.strip() for name, cell in zip(head, peer, strict=True)}
    assert (cells["× our time"], cells["× our memory"]) == ("2.50", "50.00")
    assert "1 of 128 ids differ" in text
    assert "| met" in text


def test_scores_survive_the_record(tmp_path: Path):
    scored = Row("quality: qqp", "teacher", "dlmone_fast", True, at=20, rows_scored=9,
                 scores={"bleu": Score(0.2, 0.1, 0.3), "div_4": Score(0.9)})  # fmt: skip
    path = records.save(records.record(torch.device("cpu"), {}, [scored], []), tmp_path)
    assert records.rows_of(json.loads(path.read_text())) == [scored]


def test_a_record_of_other_sources_or_of_a_dirty_tree_says_so():
    found: dict[str, object] = {"uncommitted_changes": False, "content_hash": "a"}
    assert records.caveat({"environment": found}, "a") == ""
    assert "another version" in records.caveat({"environment": found}, "b")
    found |= {"cores": 2, "load_at_start": 1.5}
    assert "beside other work (load average 1.5" in records.caveat({"environment": found}, "a")
    found |= {"uncommitted_changes": True, "load_at_start": 0.3}
    assert records.caveat({"environment": found}, "a") == "measured with uncommitted changes"
