"""From data to a released folder: slices, cost, the choice of a student, the card."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dlmone_fast
from dlmone_fast.cli import parse
from dlmone_fast.errors import InterruptedAndSavedError, UsageError
from dlmone_fast.evaluation.run import evaluate_model
from dlmone_fast.models.folder import load_folder
from dlmone_fast.release import evaluation as release_evaluation
from dlmone_fast.release.__main__ import PRESET, SCHEDULES, ReleaseArgs, main, release_config
from dlmone_fast.release.evaluation import PhaseCost, phase_costs, table
from dlmone_fast.release.folder import overlap
from dlmone_fast.release.temperature import OF_STUDENTS, OF_TEACHERS, choose_temperature
from dlmone_fast.training import run

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


def options(**changes: Any) -> ReleaseArgs:
    usual = ReleaseArgs("data", schedule="smoke", device="cpu", seed=3, max_minutes=2.0)
    return replace(usual, **changes)


def test_every_schedule_is_a_configuration():
    for path in SCHEDULES.glob("*.toml"):
        config = release_config(options(schedule=path.stem))
        assert config.preset == ("g2p" if path.stem == "g2p-en" else PRESET)
        assert (config.seed, config.max_minutes, config.device) == (3, 2.0, "cpu")
    assert release_config(options()).data.task == "qqp"
    assert release_config(options(task="custom")).output_dir == "runs/release-custom-smoke"
    with pytest.raises(UsageError, match=r"--schedule: expected one of .*smoke.*, got 'none'"):
        release_config(options(schedule="none"))


def test_help_names_every_schedule_of_the_package(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert SCHEDULES.parent == Path(dlmone_fast.__file__).parent / "release"
    for path in SCHEDULES.glob("*.toml"):
        assert path.stem in shown
    with pytest.raises(UsageError, match="--mbr-rows: expected 0 or more, got -1"):
        main(["--data-dir", "data", "--mbr-rows", "-1"])


def test_costs_are_summed_over_the_slices_of_a_phase(tmp_path: Path):
    lines = [
        {"phase": "teacher", "step": 10, "rows": 600, "seconds": 60.0},
        {"phase": "teacher", "step": 10, "valid_loss": 1.0},
        {"phase": "teacher", "step": 20, "rows": 600, "seconds": 120.0},
        {"phase": "stage1", "step": 4, "rows": 60, "seconds": 60.0},
        # Again from the checkpoint of step 10.
        {"phase": "teacher", "step": 20, "rows": 600, "seconds": 60.0},
    ]
    # A process that was killed left half a line.
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "teac\n'
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
    command += ["--device", "cpu", "--mbr-rows", "3", "--seed", "5", "--task", "custom"]
    with pytest.raises(UsageError, match="--terms: expected the terms of the data"):
        main(command)
    command += ["--terms", "Made up: do as you like."]
    with pytest.raises(InterruptedAndSavedError, match="1 of 20 steps of teacher"):
        main([*command, "--max-minutes", "1e-6"])
    run(release_config(parse(ReleaseArgs, prog="", description="", args=command)))
    slices = 1
    while not (root / "release").exists():
        slices += 1
        with suppress(InterruptedAndSavedError):
            main([*command, "--max-minutes", "1e-6"])
    # One system of the evaluation each.
    assert slices == 9
    capsys.readouterr()
    main(command)
    printed = capsys.readouterr().out
    folder = load_folder(root / "release")
    assert {str(tensor.dtype) for tensor in folder.tensors.values()} == {"torch.bfloat16"}
    # Chosen among all on the validation split.
    measured = json.loads((root / "temperature-teacher.json").read_text())
    assert set(measured) == {str(t) for t in OF_TEACHERS}
    assert folder.generation_config["temperature"] in OF_STUDENTS
    evaluation = folder.read_json("evaluation.json")
    assert [cost["phase"] for cost in evaluation["cost"]] == [
        "teacher", "pairs", "stage1", "stage2",
    ]  # fmt: skip
    student = next(row for row in evaluation["rows"] if row["system"] == "student")
    assert (student["calls"], student["texts"], student["sources"]) == (1, 10, 25)
    assert student["scores"]["bleu"] == pytest.approx(_bleu_of_candidates(root, data), abs=1e-12)
    assert [row["system"] for row in evaluation["rows"]][-2:] == ["copy", "reference"]
    assert evaluation["rows"][-1]["scores"]["bleu"] == 1
    assert len(evaluation["slices"]) == slices
    assert evaluation["cost"][0]["samples"] == 20 * 32
    card = (root / "release" / "README.md").read_text(encoding="utf-8")
    assert printed.strip() in card
    assert "do as you like" in card
    shown = [line for line in card.splitlines() if line.startswith("| 19 |")]
    assert len(shown) == 1
    texts = dlmone_fast.generate(["a new house ?"], model=root / "release", on_overflow="truncate")
    assert isinstance(texts[0], str)
    # Paths of the machine that trained it are not published.
    for path in (root / "release").glob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8")


def _bleu_of_candidates(root: Path, data: Path) -> float:
    """The student's BLEU again, from the released folder, with the run's seed."""
    student = dlmone_fast.load(root / "release", dtype="fp32", backend="eager")
    scores = evaluate_model(student, str(data), num_candidates=10, seed=5, batch_size=256)
    found: float = scores["bleu"]
    return found


def test_overlap_counts_pairs_in_either_order_case_and_punctuation_aside(tmp_path: Path):
    for split, pairs in (
        ("train", [("One!", "two"), ("three", "four")]),
        ("test", [("TWO?", "one"), ("three", "five"), ("six", "seven")]),
    ):
        text = "".join(json.dumps({"src": a, "trg": b}) + "\n" for a, b in pairs)
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    found = overlap(tmp_path)
    assert found.startswith("Of 3 test pairs 1 also occur in the training split, in either order; ")
    assert "2 share a text with it; in 1 both texts are unseen" in found


class FinishedRun:
    """A run whose systems were scored on the validation split already."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.workspace = root, self
        self.data_dir, self.config = data, release_config(options(data_dir=str(data)))

    def model(self, stage: str) -> Path:
        return self.root / stage

    def keep(self, stage: str, **changed: dict[str, float]) -> None:
        usual = {"bleu": 0.1, "ibleu": 0.0, "source_bleu": 0.2, "self_bleu": 0.3}
        scores = {str(t): usual | changed.get(f"t{t}", {}) for t in {*OF_TEACHERS, *OF_STUDENTS}}
        (self.root / f"temperature-{stage}.json").write_text(json.dumps(scores), encoding="utf-8")


def test_the_second_stage_is_released_unless_it_is_worse(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    finished = FinishedRun(tmp_path, data)
    monkeypatch.setattr(release_evaluation, "load_model", lambda stage, *_, **__: stage)
    choose = lambda: release_evaluation.better_student(finished, print)  # type: ignore[arg-type]  # noqa: E731
    finished.keep("stage1", **{"t0.5": {"bleu": 0.2}})
    finished.keep("stage2", **{"t0.3": {"bleu": 0.2}})
    assert choose() == ("stage2", 0.3)
    finished.keep("stage1", **{"t0.5": {"bleu": 0.21}})
    assert choose() == ("stage1", 0.5)
    # One that always says the same is not better.
    finished.keep("stage1", **{f"t{t}": {"bleu": 0.3, "self_bleu": 0.5} for t in OF_STUDENTS})
    assert choose() == ("stage2", 0.3)


def test_a_temperature_is_chosen_among_texts_that_neither_copy_nor_repeat(
    data: Path, tmp_path: Path
):
    finished = FinishedRun(tmp_path, data)
    finished.keep(
        "model",
        **{
            "t0.7": {"bleu": 0.5, "source_bleu": 0.46},
            "t0.3": {"bleu": 0.4, "self_bleu": 0.41},
            "t0.5": {"bleu": 0.3, "source_bleu": 0.45, "self_bleu": 0.4},
        },
    )

    def choose(diverse: bool) -> float:
        return choose_temperature(
            tmp_path / "temperature-model.json", None, [],  # type: ignore[arg-type]
            steps=1, sampler=None, seed=0, temperatures=OF_STUDENTS, diverse=diverse, say=print,
        ).temperature  # fmt: skip

    assert choose(diverse=True) == 0.5
    assert choose(diverse=False) == 0.3
    # None within the bounds: as the model was trained.
    finished.keep("model", **{f"t{t}": {"source_bleu": 0.9} for t in OF_STUDENTS})
    assert choose(diverse=False) == 1.0


def test_what_one_text_cannot_have_is_left_empty():
    row = {"calls": 1, "sources": 9, "intervals": {"bleu": [0.4, 0.7]}}
    one = {**row, "system": "a", "texts": 1, "scores": {"bleu": 0.5}}
    ten = {**row, "system": "b", "texts": 10, "scores": {"bleu": 0.5, "div_4": 1.0}}
    text = table([one, ten], "qqp")
    title = text.columns.index("Div-4")
    assert [cells[title] for cells in text.rows[:2]] == ["-", "1.000"]
    assert "0.500 ± 0.150" in text.rows[0]
    assert any("MBR-10 (paper)" in row[0] for row in text.rows)
