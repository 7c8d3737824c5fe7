"""The cases of the ablation tables are configurations, and see equally many rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import ablation


def test_every_case_is_a_configuration_of_equal_length():
    seen = {}
    for task, cases in (("grammar", ablation.GRAMMAR_CASES), ("qqp", ablation.QQP_CASES)):
        options = argparse.Namespace(task=task, data_dir="data")
        for case in cases.values():
            config = ablation._config(options, case, Path("runs/x"), 4)
            assert config.seed == 4
            seen.setdefault(task, set()).add(config.teacher.steps * config.teacher.batch_size)
            assert not config.data.both_directions
    assert seen == {"grammar": {200 * 128}, "qqp": {51_200}}
