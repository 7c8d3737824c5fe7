"""The cases of the ablation tables are configurations, and see equally many rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import ablation


def test_every_case_is_a_configuration_of_equal_length():
    rows, updates = {}, {}
    for task, cases in ablation.CASES.items():
        options = argparse.Namespace(task=task, data_dir="data")
        for name, case in cases.items():
            config = ablation._config(options, case, Path("runs/x"), 4)
            assert config.seed == 4
            assert config.data.both_directions == ("both directions" in name)
            rows.setdefault(task, set()).add(config.teacher.steps * config.teacher.batch_size)
            updates.setdefault(task, set()).add(config.distill.stage1.steps)
    assert rows == {"grammar": {200 * 128}, "qqp": {51_200}, "student": {450 * 128}}
    assert len(updates["student"]) == 1
