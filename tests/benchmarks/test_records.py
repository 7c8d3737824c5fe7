"""Floors, targets and records are arithmetic that can be checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import floors, records, shapes, tables, targets
from benchmarks.floors import Machine, Work
from benchmarks.records import Row, Score
from benchmarks.shapes import Shape

ROUNDING = ("rounding", "128 tokens float32")


def test_a_floor_is_the_slower_of_moving_and_computing():
    machine = Machine(bandwidth=1e9, copy=5e8, fp32=1e9, bf16=4e9, source="made up")
    assert machine.floor_seconds(Work(bytes=2_000_000_000, flops=1_000)) == 2.0
    assert machine.floor_seconds(Work(bytes=0, flops=8_000_000_000)) == 8.0
    assert machine.floor_seconds(Work(bytes=0, flops=8_000_000_000, precision="bf16")) == 2.0


def test_floors_of_the_operations():
    shape = Shape(128)
    assert shape.bytes == 128 * 128 * 128 * 4
    # On an H200, in microseconds: 8.4 MB a pass at 4.3 TB/s; 1.0 GFLOP a sequence at 790 TFLOP/s.
    h200 = Machine(bandwidth=4.3e12, copy=4.3e12, fp32=50e12, bf16=790e12, source="published")
    assert 1e6 * h200.floor_seconds(floors.forward_diffusion(shape)) == pytest.approx(3.9, abs=0.1)
    assert 1e6 * h200.floor_seconds(floors.distillation_loss(shape)) == pytest.approx(11.7, abs=0.1)
    rounding = floors.rounding(128 * 128, "bf16")
    assert 1e6 * h200.floor_seconds(rounding) == pytest.approx(162, abs=1)
    assert 1e6 * h200.floor_seconds(floors.rounding(128, "bf16")) == pytest.approx(1.8, abs=0.1)
    half = Shape(128, dtype=torch.bfloat16)
    assert 2 * half.bytes == shape.bytes
    large = Shape(8192)
    tokens = floors.forward_diffusion_of_tokens(large).bytes
    assert tokens == pytest.approx(floors.forward_diffusion(large).bytes / 2, rel=0.05)
    assert floors.linear_cross_entropy(1, torch.float32).flops == 6 * 30_522 * 128


def test_the_largest_gpu_shapes_exceed_the_cache():
    for by_device in (shapes.NOISE, shapes.FORWARD_DIFFUSION, shapes.DISTILLATION_LOSS,
                      shapes.HIDDEN_STATES, shapes.FEED_FORWARD):  # fmt: skip
        assert max(shape.bytes for shape in by_device["cuda"]) >= 4 * 60_000_000


def test_targets_name_shapes_and_peers_that_are_timed():
    timed = {
        "rounding": shapes.ROUNDING,
        "noise": shapes.NOISE,
        "forward diffusion": shapes.FORWARD_DIFFUSION,
        "distillation loss": shapes.DISTILLATION_LOSS,
        "linear cross-entropy": shapes.LINEAR_CROSS_ENTROPY,
    }
    for target in targets.TARGETS:
        cases = timed[target.operation][target.device]
        assert target.case in [str(shape) for shape in cases], target


def rows(ours: float, theirs: float, memory: int = 10) -> list[Row]:
    return [
        Row(*ROUNDING, "dlmone_fast cpp", True, ours, ours, 5, peak_bytes=memory),
        Row(*ROUNDING, "dlmone_fast torch", True, 99.0, 99.0, 5, peak_bytes=99),
        Row(*ROUNDING, targets.MATMUL_ARGMIN, False, theirs, theirs, 5, peak_bytes=500),
        Row(*ROUNDING, targets.ALL_DIFFERENCES, False, 900.0, 900.0, 3, peak_bytes=2000),
    ]


def outcomes(measured: list[Row]) -> dict[str, str]:
    judged = targets.judge(measured, "cpu", copy_bandwidth=1e9)
    return {target["target"].split(": ")[1]: target["outcome"] for target in judged}


def test_targets_are_judged_by_the_backend_that_auto_takes():
    found = outcomes(rows(ours=4.0, theirs=10.0))
    assert found["time ≤ 0.42× matmul + argmin"] == "met"
    assert found["memory ≤ 0.01× DiffuSeq get_knn"] == "met"
    assert found["≤ 0.1 ms"] == "not measured"
    assert outcomes(rows(4.3, 10.0, memory=30)) == {
        "time ≤ 0.42× matmul + argmin": "not met",
        "time ≤ 0.22× matmul + argmin": "not measured",
        "memory ≤ 0.01× DiffuSeq get_knn": "not met",
        "≤ 0.1 ms": "not measured",
    }


def test_a_peer_that_was_not_timed_leaves_its_targets_open():
    left_out = [r for r in rows(4.0, 10.0) if r.implementation != targets.MATMUL_ARGMIN]
    left_out.append(Row(*ROUNDING, targets.MATMUL_ARGMIN, False, note="failed"))
    assert outcomes(left_out)["time ≤ 0.42× matmul + argmin"] == "not measured"


def test_bandwidth_is_compared_with_a_copy():
    case = ("forward diffusion", "8192×128×128 float32")
    own = Row(*case, "dlmone_fast triton", True, 1.0, 1.0, 9, gigabytes_per_second=90.0)
    target = next(t for t in targets.TARGETS if t.measure == "bandwidth" and t.case == case[1])
    assert targets.measured(target, [own], copy_bandwidth=100e9) == pytest.approx(0.9)


def test_a_record_is_written_and_reads_back_as_a_report(tmp_path: Path):
    cpu = torch.device("cpu")
    machine = Machine(1e10, 1e10, 1e12, 2e12, "measured").record()
    judged = targets.judge(rows(4.0, 10.0), "cpu", 1e10)
    wrong = Row(*ROUNDING, "other", False, note="wrong, so not timed: 1 of 128 ids differ")
    path = records.save(records.record(cpu, machine, [*rows(4.0, 10.0), wrong], judged), tmp_path)
    assert path.parent.parent == tmp_path
    read = json.loads(path.read_text())
    assert {"date", "device", "cpu", "threads", "python", "torch", "triton", "dlmone_fast",
            "commit", "uncommitted_changes"} <= set(read["environment"])  # fmt: skip
    assert records.rows_of(read) == [*rows(4.0, 10.0), wrong]
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


def test_the_content_hash_is_of_names_and_bytes_and_of_nothing_built(tmp_path: Path):
    source = tmp_path / "dlmone_fast" / "a.py"
    source.parent.mkdir()
    source.write_text("x = 1")
    first = records.content_hash(tmp_path)
    (tmp_path / "dlmone_fast" / "_C.so").write_bytes(b"built")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "b.py").write_text("y = 2")
    assert records.content_hash(tmp_path) == first
    source.write_text("x = 2")
    changed = records.content_hash(tmp_path)
    source.rename(source.with_name("c.py"))
    assert len({first, changed, records.content_hash(tmp_path)}) == 3


def test_a_record_of_other_sources_or_of_a_dirty_tree_says_so():
    found: dict[str, object] = {"uncommitted_changes": False, "content_hash": "a"}
    assert records.caveat({"environment": found}, "a") == ""
    assert "another version" in records.caveat({"environment": found}, "b")
    found |= {"cores": 2, "load_at_start": 1.5}
    assert "beside other work (load average 1.5" in records.caveat({"environment": found}, "a")
    found |= {"uncommitted_changes": True, "load_at_start": 0.3}
    assert records.caveat({"environment": found}, "a") == "measured with uncommitted changes"
