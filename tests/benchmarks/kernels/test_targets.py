"""Floors and targets of the kernels are arithmetic that can be checked."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness.floors import Machine
from benchmarks.harness.records import Row
from benchmarks.harness.targets import judge, measured
from benchmarks.kernels import floors, shapes, targets
from benchmarks.kernels.shapes import Shape

ROUNDING = ("rounding", "128 tokens float32")


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


def outcomes(rows: list[Row]) -> dict[str, str]:
    judged = judge(rows, "cpu", 1e9, targets.TARGETS)
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
    assert measured(target, [own], copy_bandwidth=100e9) == pytest.approx(0.9)
