"""The paper's tables and figures: its rows are always there, ours or the reason beside them."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.harness import records
from benchmarks.harness.records import Row, Score
from benchmarks.paper import __main__ as paper
from benchmarks.paper import figures as paper_figures
from benchmarks.paper import stage3 as paper_stage3
from benchmarks.paper import tables as paper_tables
from benchmarks.quality import frontier
from benchmarks.quality import plots as quality_plots
from benchmarks.quality.curves import Figure, Point
from benchmarks.quality.pairs import open_pair
from dlmone_fast.errors import BackendUnavailableError, UsageError
from dlmone_fast.evaluation import mbr
from dlmone_fast.evaluation.generations import GenerationSet
from dlmone_fast.evaluation.scores import score_generations
from dlmone_fast.tasks import paper as published
from dlmone_fast.training import RunResult, run
from tests.training.conftest import tiny_config

COMMANDS = [["--table", n] for n in "12346"] + [["--figure", n] for n in "234"]


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.paper.lines.BOOTSTRAP", 20)
        patch.setattr(paper_figures, "BOOTSTRAP", 20)
        patch.setattr(frontier, "BOOTSTRAP", 20)
        patch.setattr("dlmone_fast.comparison.measure._LATENCY_RUNS", 2)
        patch.setattr("benchmarks.quality.systems.TEACHER_CALLS", (2,))
        patch.setattr("benchmarks.quality.systems.SAMPLERS", ("ddim",))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A finished run of a few steps with few timesteps."""
    overrides: dict[str, Any] = {
        "diffusion": {"num_timesteps": 40},
        "teacher": {"steps": 2, "warmup_steps": 1},
        "distill": {"t_init": 30, "t_max": 39, "stage1": {"steps": 1}, "stage2": {"steps": 1}},
        "evaluation": {"teacher_steps": "5"},
        "device": "cpu",
    }
    return run(tiny_config(tmp_path_factory.mktemp("paper") / "run", **overrides))


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert paper.main([str(value) for value in arguments]) == 0
    return capsys.readouterr().out


def of_run(finished: RunResult, *more: object) -> list[object]:
    return ["--run", finished.root, "--device", "cpu", "--rows", 2, *more]


def cells(text: str, start: str) -> list[list[str]]:
    """The cells of the table lines whose second cell, or first, begins so."""
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [line for line in found if any(cell.startswith(start) for cell in line[:2])]


@pytest.mark.parametrize("command", COMMANDS, ids="".join)
def test_without_models_the_papers_rows_stand_alone(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(records, "RESULTS", Path("nowhere"))
    text = output(capsys, *command, "--device", "cpu")
    assert "not run: no" in text
    assert "2506.00290" in text
    assert "ours:" in text


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[1] != "2"], ids="".join)
def test_a_run_that_is_not_there_is_a_reason_not_an_error(
    command: list[str], capsys: pytest.CaptureFixture[str]
):
    assert "not run: --run nowhere" in output(capsys, *command, "--run", "nowhere")


def test_table_1_has_teacher_and_student(finished: RunResult, capsys: pytest.CaptureFixture[str]):
    text = output(capsys, "--table", 1, *of_run(finished))
    teacher, student = cells(text, "ours:")
    assert teacher[:4] == ["grammar", "ours: teacher, ancestral", "40", "2"]
    assert student[:4] == ["grammar", "ours: student", "1", "2"]
    assert "±" in student[4]
    assert student[6] == "-"
    assert "BERTScore: not run: no local model given" in text
    assert cells(text, "qqp")[1][4] == "0.1788"
    assert len(cells(text, "copy of the source")) == len(cells(text, "reference")) == 1


def test_table_1_of_a_student_alone_says_so(
    finished: RunResult, capsys: pytest.CaptureFixture[str]
):
    folders = ["--student", finished.student, "--data-dir", finished.root / "data"]
    text = output(capsys, "--table", 1, *folders, "--rows", 2, "--device", "cpu")
    assert "ours, teacher: not run: no teacher is given" in text
    assert len(cells(text, "ours: student")) == 1


def test_table_3_compares_the_stages(finished: RunResult, capsys: pytest.CaptureFixture[str]):
    text = output(capsys, "--table", 3, *of_run(finished))
    assert [line[1] for line in cells(text, "ours:")] == [
        "ours: student of stage 1",
        "ours: student of stage 2",
    ]


def test_table_4_has_three_numbers_of_calls(
    finished: RunResult, capsys: pytest.CaptureFixture[str]
):
    text = output(capsys, "--table", 4, *of_run(finished))
    assert [line[2] for line in cells(text, "ours:")] == ["1", "2", "4"]
    assert [line[4] for line in cells(text, "paper:")] == ["0.1788", "0.1800", "0.1829"]


def test_table_6_has_the_choice_and_the_diversity_of_all(
    finished: RunResult, capsys: pytest.CaptureFixture[str]
):
    few = ["--teacher-sampler", "ddim", "--teacher-calls", 2]
    text = output(capsys, "--table", 6, *of_run(finished, *few))
    teacher, student = cells(text, "ours:")
    assert teacher[1:3] == ["ours: teacher, ddim, MBR-10", "2"]
    # Self-BLEU needs several candidates: it is not that of the choice.
    assert "±" in student[8]


def latency_record(folder: Path, name: str, rows: list[Row], date: str) -> None:
    record = records.record(torch.device("cpu"), {}, rows, [])
    record["environment"]["date"] = date
    (folder / "here").mkdir(parents=True, exist_ok=True)
    (folder / "here" / f"{name}.json").write_text(json.dumps(record))


def latency_row(case: str, seconds: float, steps: int, **more: Any) -> Row:
    name = f"dlmone_fast eager, {steps} steps"
    milliseconds = 1e3 * seconds
    return Row("latency", case, name, True, 1.0, mean_ms=milliseconds, at=steps, **more)


def test_table_2_reads_the_newest_figures_of_each_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    old = [latency_row("compact", 9.0, 65), latency_row("BERT-base", 7.0, 65)]
    latency_record(tmp_path, "20260101", old, "2026-01-01")
    newer = [latency_row("compact", 2.5, 65), latency_row("compact", 8.0, 286, derived="from 65")]
    latency_record(tmp_path, "20260102", newer, "2026-01-02")
    latency_record(tmp_path, "20260103", [Row("noise", "x", "y", True, 1.0)], "2026-01-03")
    text = paper_tables.table_2(argparse.Namespace(device="cpu"))
    assert [line[:4] for line in cells(text, "65")] == [
        ["65", "0.51", "2.5", "compact"], ["65", "0.51", "7", "BERT-base"]
    ]  # fmt: skip
    assert cells(text, "286")[0][:3] == ["286", "2.25", "8 (derived)"]
    assert cells(text, "2000")[0][:3] == ["2000", "14.94", "-"]


def test_table_2_takes_no_record_of_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    latency_record(tmp_path, "1", [latency_row("compact", 1.0, 65)], "2026")
    monkeypatch.setattr(paper_tables, "device_name", lambda device: "another device")
    text = paper_tables.table_2(argparse.Namespace(device="cpu"))
    assert "not run: no record of another device holds latency rows" in text


def test_figure_2_has_a_point_for_each_number_of_candidates(
    finished: RunResult, capsys: pytest.CaptureFixture[str]
):
    few = ["--teacher-sampler", "ddim", "--teacher-calls", 2]
    text = output(capsys, "--figure", 2, *of_run(finished, *few))
    assert [line[1] for line in cells(text, "student")] == [str(k) for k in range(1, 11)]
    assert len(cells(text, "teacher, ddim")) == 10
    assert cells(text, "copy of the source")[0][3] != "-"


def test_prefixes_of_the_candidates_choose_as_mbr_does():
    texts = [["a b c d", "x y"], ["a b c e", "x z y"], ["q r", "x y"], ["a b c d e", "y"]]
    given = GenerationSet(["s t", "u v"], ["a b c d e", "x y z"], texts)
    options = argparse.Namespace(seed=0, bertscore_model=None, bertscore_layer=None)
    points = paper_figures._choices("student", given, options)
    for k, point in enumerate(points, start=1):
        expected = score_generations(
            given.sources, given.references, texts[:k], mbr=True, bootstrap=0
        )
        chosen = expected["mbr"] or expected
        assert point.x == k
        for name in ("bleu", "rouge_l", "dist_1"):
            assert point.scores[name].value == pytest.approx(chosen[name]), (k, name)
    assert mbr.select_mbr([column[0] for column in texts]) != 2


def test_figure_3_is_the_frontiers_measuring(
    finished: RunResult, capsys: pytest.CaptureFixture[str]
):
    text = output(capsys, "--figure", 3, *of_run(finished))
    assert [line[1] for line in cells(text, "student")] == ["1", "2", "4"]
    assert [line[1] for line in cells(text, "teacher, ancestral")] == ["40"]


def contents(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_figure_4_trains_on_without_touching_the_run(
    finished: RunResult, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    before = contents(finished.root)
    more = ["--steps", 2, "--every", 1, "--output-dir", tmp_path / "third"]
    text = output(capsys, "--figure", 4, *of_run(finished, *more))
    assert contents(finished.root) == before
    assert [line[1] for line in cells(text, "θ, stage 3")] == ["0", "1", "2"]
    assert (tmp_path / "third" / "cache").is_dir()
    assert "plateaus" in text


def test_a_third_stage_starts_from_stage_2_and_the_teacher(finished: RunResult, tmp_path: Path):
    phase = paper_stage3.third_stage(finished.root, finished.root / "data", tmp_path, 5, "cpu")
    assert (phase.name, phase.config.steps) == ("stage3", 5)
    second = finished.workspace.config.distill.stage2
    assert dataclasses.replace(phase.config, steps=second.steps) == second
    score = phase.stage.score.backbone
    for network, folder in ((phase.stage.generator, "stage2"), (score, "teacher")):
        wanted = load_file(finished.root / folder / "model.safetensors")
        found = network.state_dict()
        shared = [name for name in wanted if name.removeprefix("backbone.") in found]
        assert len(shared) > 10
        assert all(torch.equal(found[n.removeprefix("backbone.")], wanted[n]) for n in shared)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--table", "1", "--plot", "x.png"], "--plot draws a figure"),
        (["--figure", "3", "--steps", "5"], "--steps belongs to --figure 4"),
        (["--figure", "4", "--every", "0"], "--every: expected at least 1"),
        (["--figure", "4", "--rows", "-1"], "--rows: expected 0"),
        (["--table", "3", "--student", "s", "--data-dir", "."], "."),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], words: str, tmp_path: Path):
    (tmp_path / "test.jsonl").write_text('{"src": "a", "trg": "b"}\n')
    arguments = [str(tmp_path) if value == "." else value for value in arguments]
    with pytest.raises(UsageError, match=words):
        paper.main(arguments)


@pytest.mark.parametrize("arguments", [[], ["--table", "5"], ["--table", "1", "--figure", "2"]])
def test_what_argparse_refuses_ends_with_2(arguments: list[str]):
    with pytest.raises(SystemExit) as ended:
        paper.main(arguments)
    assert ended.value.code == 2


def test_the_output_of_figure_4_may_not_lie_in_the_run(finished: RunResult):
    inside = finished.root / "third"
    with pytest.raises(UsageError, match="lies in the run folder"):
        paper.main(list(map(str, ["--figure", 4, *of_run(finished, "--output-dir", inside)])))
    assert not inside.exists()


def figure() -> Figure:
    scores = {m.name: Score(0.5, 0.4, 0.6) for m in paper_figures.SENTENCE_METRICS[:2]}
    points = [Point(name, x, scores, 3) for name in ("teacher", "student") for x in (1, 10, 100)]
    return Figure(
        "made up", "NFE", paper_figures.SENTENCE_METRICS, points, {"bleu": Score(0.2)}, True
    )


def test_a_figure_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    quality_plots.draw(figure(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_that_cannot_be_written_is_refused_before_measuring():
    pytest.importorskip("matplotlib")
    for name in ("nowhere/x.png", "x.pdf"):
        with pytest.raises(UsageError, match=r"expected a \.png file"):
            paper.main(["--figure", "2", "--plot", name])


def test_without_matplotlib_the_command_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(BackendUnavailableError, match="install it, or leave --plot out"):
        paper.main(["--figure", "2", "--plot", "x.png"])


def test_matplotlib_is_loaded_by_plots_only():
    spec = importlib.util.find_spec("benchmarks.quality.plots")
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    assert not any(line.startswith(("import matplotlib", "from mat")) for line in text.splitlines())


def test_published_points_belong_to_their_task():
    found = paper_figures.published_points(published.FIGURE_2, "wiki-auto", "candidates")
    assert [(p.system, p.x, p.scores["bleu"].value) for p in found] == [
        ("paper: DiffuSeq", 1, 0.2929),
        ("paper: DLM-One", 1, 0.2927),
        ("paper: DiffuSeq", 10, 0.3622),
        ("paper: DLM-One", 10, 0.3630),
    ]
    assert paper_figures.published_points(published.FIGURE_2, "grammar", "candidates") == []


def test_a_run_names_its_task_and_data(finished: RunResult):
    named = {"run": finished.root, "teacher": None, "student": None, "data_dir": None}
    pair = open_pair(argparse.Namespace(**named, device="cpu", dtype="fp32"))
    assert (pair.task, pair.data_dir) == ("grammar", finished.root / "data")
    assert pair.student_folder == finished.root / "stage2"
