"""From data to a released folder: slices, cost, the choice of a student, the card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import dlmone_fast
from benchmarks import release_evaluation, train_release
from benchmarks.release_cost import PhaseCost, phase_costs
from benchmarks.release_evaluation import Evaluated, table
from benchmarks.train_release import SCHEDULES, release_config
from dlmone_fast.errors import InterruptedAndSavedError, UsageError
from dlmone_fast.models.folder import load_folder

WORDS = ("a", "the", "new", "old", "house", "song", "we", "you", "find", "sell", "how", "why")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short made-up pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    for split, count in (("train", 120), ("valid", 12), ("test", 25)):
        rows = [
            {"src": " ".join(WORDS[(i * 7 + j) % 12] for j in range(4)) + " ?",
             "trg": " ".join(WORDS[(i * 5 + j) % 12] for j in range(5)) + " ?"}
            for i in range(count)
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def options(**changes: object) -> argparse.Namespace:
    given = {
        "schedule": "smoke", "data_dir": "data/qqp", "output_dir": "", "device": "cpu", "seed": 3,
        "max_minutes": 2.0, **changes,
    }  # fmt: skip
    return argparse.Namespace(**given)


def test_every_schedule_is_a_configuration():
    for path in SCHEDULES.glob("*.toml"):
        config = release_config(options(schedule=path.stem))
        assert config.preset == train_release.PRESET
        assert (config.seed, config.max_minutes, config.device) == (3, 2.0, "cpu")
    assert release_config(options()).data.task == "qqp"
    assert release_config(options()).output_dir == "runs/smoke-qqp"
    assert release_config(options(data_dir="data/e2e")).data.task == "custom"
    with pytest.raises(UsageError, match=r"--schedule: expected one of .*smoke.*, got 'none'"):
        release_config(options(schedule="none"))


def test_costs_are_summed_over_the_slices_of_a_phase(tmp_path: Path):
    lines = [
        {"phase": "teacher", "step": 10, "samples": 600, "samples_per_second": 10.0},
        {"phase": "teacher", "step": 10, "valid_loss": 1.0},
        {"phase": "teacher", "step": 20, "samples": 600, "samples_per_second": 5.0},
        {"phase": "stage1", "step": 4, "samples": 60, "samples_per_second": 1.0},
        # Again from the checkpoint of step 10.
        {"phase": "teacher", "step": 20, "samples": 600, "samples_per_second": 10.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert phase_costs(tmp_path) == [
        PhaseCost("teacher", 20, 1800, 4.0),
        PhaseCost("stage1", 4, 60, 1.0),
    ]


def test_a_run_in_slices_ends_in_a_folder_that_generates(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root = tmp_path / "run"
    command = ["--data-dir", str(data), "--schedule", "smoke", "--output-dir", str(root)]
    command += ["--device", "cpu", "--rows", "6", "--mbr-rows", "3"]
    with pytest.raises(InterruptedAndSavedError, match="teacher"):
        train_release.main([*command, "--max-minutes", "1e-6"])
    assert not (root / "release").exists()
    capsys.readouterr()
    train_release.main(command)
    printed = capsys.readouterr().out
    folder = load_folder(root / "release")
    assert {str(tensor.dtype) for tensor in folder.tensors.values()} == {"torch.bfloat16"}
    evaluation = folder.read_json("evaluation.json")
    assert [cost["phase"] for cost in evaluation["cost"]] == [
        "teacher", "pairs", "stage1", "stage2",
    ]  # fmt: skip
    student = next(row for row in evaluation["rows"] if row["system"] == "student")
    assert (student["calls"], student["texts"], student["rows"]) == (1, 10, 6)
    card = (root / "release" / "README.md").read_text(encoding="utf-8")
    assert printed.strip() in card
    shown = [line for line in card.splitlines() if line.startswith("| 19 |")]
    assert len(shown) == 1
    texts = dlmone_fast.generate(["a new house ?"], model=root / "release", on_overflow="truncate")
    assert isinstance(texts[0], str)
    # Where a machine keeps its data is nobody's business.
    for path in (root / "release").glob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8")


def test_the_second_stage_is_released_unless_it_is_worse(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    scores = {"stage1": 0.2, "stage2": 0.2}

    class Workspace:
        data_dir = data
        config = release_config(options(data_dir=str(data)))

        @staticmethod
        def model(stage: str) -> str:
            return stage

    class Result:
        workspace = Workspace()

    monkeypatch.setattr(release_evaluation, "load_model", lambda stage, *_: stage)
    monkeypatch.setattr(
        release_evaluation, "evaluate_model", lambda stage, **_: {"ibleu": scores[stage]}
    )
    choose = lambda: release_evaluation.better_student(Result(), print)  # type: ignore[arg-type]  # noqa: E731
    assert choose() == "stage2"
    scores["stage1"] = 0.21
    assert choose() == "stage1"


def test_what_one_text_cannot_have_is_left_empty():
    scores = {"bleu": 0.5, "div_4": 1.0, "intervals": {"bleu": [0.4, 0.7]}}
    text = table([Evaluated("a", 1, 1, 9, scores), Evaluated("b", 1, 10, 9, scores)], "qqp")
    one, ten = (row for row in text.rows if row[0] in "ab")
    title = text.columns.index("Div-4")
    assert (one[title], ten[title]) == ("-", "1.000")
    assert "0.500 ± 0.150" in one
    assert any("MBR-10 (paper)" in row[0] for row in text.rows)
