"""The plan for many GPUs: its formula, and the bytes against those that two processes send."""

from __future__ import annotations

import pytest

from benchmarks.ranks import measured_table, plan_table
from benchmarks.training.cases import STEPS
from benchmarks.training.ranks_model import GPUS, Machine, Work, works


def test_seconds_of_an_update():
    machine = Machine(flops=10.0, inside=4.0, between=1.0, latency=0.5)
    work = Work("stage 1", updates=1, rows=64, flops=160, sent=16, calls=3)
    assert machine.seconds(work, 1) == 16.0
    # 160 / 20, 2 · 1/2 · 16 bytes at 4 a second, three collectives.
    assert machine.seconds(work, 2) == 8.0 + 4.0 + 1.5
    assert machine.seconds(work, 8) == 2.0 + 2 * 7 / 8 * 16 / 4 + 1.5
    # Beyond a node.
    assert machine.seconds(work, 16) == 1.0 + 2 * 15 / 16 * 16 + 1.5


def test_an_update_sends_the_gradients_of_what_it_trains():
    teacher, stage, _ = works("qqp")
    # BERT-base's encoder and its frame, 128-wide embeddings of 30,522 tokens, 4 bytes each.
    assert teacher.sent == pytest.approx(4 * 91.2e6, rel=0.01)
    # ψ and θ share the embedding, which is frozen.
    assert stage.sent == pytest.approx(2 * (teacher.sent - 4 * 30_522 * 129), rel=0.01)
    assert stage.rows == 128


def test_tables_have_a_line_for_all_that_is_computed_and_measured():
    assert len(plan_table(Machine()).rows) == 8
    assert [f"{n} GPU" in str(plan_table(Machine()).columns) for n in GPUS] == [True] * len(GPUS)
    runs = {(1, 16): 4.0, (2, 16): 2.5, (2, 32): 5.0}
    found = {
        run: {step: {"seconds": [9.0, s, 1.0], "bytes": 4e6, "calls": 5} for step in STEPS}
        for run, s in runs.items()
    }
    for row in measured_table(found).rows:
        assert row[1:] == ["4.00 s", "2.50 s", "80%", "5.00 s", "80%", "4.0 MB", "5"]
