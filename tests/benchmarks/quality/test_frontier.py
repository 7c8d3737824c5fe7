"""Quality against network calls: which systems, what their rows hold, and a record of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import frontier
from benchmarks.harness import records
from benchmarks.harness.floors import Machine
from benchmarks.quality import frontier as quality
from benchmarks.quality.pairs import Pair
from benchmarks.quality.systems import affordable, possible_calls, systems
from benchmarks.report.tables import markdown
from dlmone_fast.comparison import measure
from dlmone_fast.comparison.quality import TEXT
from dlmone_fast.errors import DataError, ModelFileError, UsageError
from dlmone_fast.tasks import grammar
from tests import tiny


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlmone_fast.comparison.measure._LATENCY_RUNS", 3)
        patch.setattr(quality, "BOOTSTRAP", 20)
        patch.setattr("benchmarks.quality.systems.TEACHER_CALLS", (2, 18, 50))
        patch.setattr("benchmarks.quality.systems.SAMPLERS", ("published-ddim", "q-sampling"))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a student of random weights, T = 40, and a text task of few rows."""
    root = tmp_path_factory.mktemp("frontier")
    tiny.save(root / "teacher", "teacher")
    tiny.save(root / "student", "student", seed=1)
    data = root / "words"
    data.mkdir()
    texts = tiny.prompts(8)
    rows = [{"src": a, "trg": b} for a, b in zip(texts[:4], texts[4:], strict=True)]
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def named(folders: Path) -> list[str]:
    options = ["--teacher", folders / "teacher", "--student", folders / "student"]
    return [str(value) for value in [*options, "--data-dir", folders / "words"]]


@pytest.fixture(scope="module")
def rows(folders: Path, small: None) -> list[records.Row]:
    pair = Pair(folders / "teacher", folders / "student", folders / "words", "cpu")
    options = argparse.Namespace(rows=3, candidates=2, seed=0, full=False)
    return quality.measure_pair(pair, options, lambda _: None)


def test_the_published_sampler_makes_the_nearest_number_of_calls_that_it_can():
    assert possible_calls("published-ddim", [2, 65, 286, 667, 1000], 2000) == [
        (2, ""), (65, ""), (286, ""), (667, ""), (1000, ""),
    ]  # fmt: skip
    # With T = 40 gaps of 1, 2 and 3 make 40, 20 and 14 calls.
    assert possible_calls("published-ddim", [17, 18, 50, 60], 40) == [
        (14, "the nearest possible to 17"),
        (20, "the nearest possible to 18"),
        (40, "the nearest possible to 50"),
    ]
    assert possible_calls("ddim", [17, 50], 40) == [(17, ""), (40, "the nearest possible to 50")]


def test_long_samplers_are_scored_on_fewer_rows():
    assert affordable(1, 256, 3, full=False) == 256
    assert affordable(50, 256, 3, full=False) < 100 < affordable(50, 256, 3, full=True)
    assert affordable(2000, 256, 3, full=False) == 8


def test_every_system_is_measured_at_every_number_of_calls(rows: list[records.Row]):
    calls: dict[str, list[float | None]] = {}
    for row in rows:
        calls.setdefault(row.case, []).append(row.at)
    # 50 calls are more than T.
    assert calls == {
        "teacher, published-ddim": [2, 20, 40],
        "teacher, q-sampling": [2, 18, 40],
        "teacher, ancestral": [40],
        "undistilled (θ = φ)": [1],
        "student": [1, 2, 4],
        "copy of the source": [None],
        "reference": [None],
    }
    assert {row.operation for row in rows} == {"quality: words"}


def test_a_row_holds_time_scores_and_their_intervals(rows: list[records.Row]):
    student = next(row for row in rows if row.case == "student")
    assert student.implementation == "dlmone_fast eager fp32"
    assert student.ours
    assert student.median_ms is not None
    assert student.median_ms > 0
    assert (student.samples, student.rows_scored) == (3, 6)
    assert student.scores is not None
    assert set(student.scores) == {"bleu", "ibleu", "rouge_l", "div_4", "source_bleu"}
    for score in student.scores.values():
        assert score.low is not None
        assert score.high is not None
        assert score.low <= score.high
    copied, reference = rows[-2:]
    assert copied.scores is not None
    assert copied.scores["source_bleu"].value > copied.scores["bleu"].value
    assert reference.scores is not None
    assert reference.scores["rouge_l"].value == pytest.approx(1)
    assert "div_4" not in copied.scores
    assert (copied.median_ms, copied.ours, copied.rows_scored) == (None, False, 3)


def test_rows_survive_a_record(rows: list[records.Row], tmp_path: Path):
    import torch

    path = records.save(records.record(torch.device("cpu"), {}, rows, []), tmp_path)
    assert records.rows_of(json.loads(path.read_text())) == rows


def test_full_adds_the_published_numbers_of_calls(folders: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.quality.systems.TABLE_2", {1: 0.0, 65: 0.0, 286: 0.0})
    monkeypatch.setattr("benchmarks.quality.systems.TEACHER_CALLS", (2,))
    pair = Pair(folders / "teacher", folders / "student", folders / "words", "cpu")
    pair.teacher.denoiser.schedule.num_timesteps = 572
    found = [
        [s.calls for s in systems(pair, full) if s.sampler == "published-ddim"]
        for full in (False, True)
    ]
    assert found[0] == [2]
    assert found[1][-1] == 286
    assert len(found[1]) == 3


def test_the_command_prints_one_line_a_system(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("benchmarks.quality.systems.SAMPLERS", ("ddim",))
    monkeypatch.setattr("benchmarks.quality.systems.TEACHER_CALLS", (2,))
    assert frontier.main([*named(folders), "--rows", "2", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert lines[0].split(" | ")[0].strip("| ") == "system"
    assert "source-BLEU" in lines[0]
    # Header and ruler; ddim, ancestral, undistilled, student at 1, 2 and 4 calls, both texts.
    assert len(lines) == 2 + 8
    assert "±" in lines[2]
    assert "scoring student, 4 calls" in err
    assert "in turns" in err


def test_the_command_saves_a_record_that_the_report_reads(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    save = records.save
    monkeypatch.setattr(records, "save", lambda record: save(record, tmp_path))
    machine = Machine(1e10, 1e10, 1e12, 2e12, "made up")
    monkeypatch.setattr(frontier, "measure_machine", lambda *_: machine)
    monkeypatch.setattr("benchmarks.quality.systems.SAMPLERS", ())
    assert frontier.main([*named(folders), "--rows=2", "--device=cpu", "--save-records"]) == 0
    path = next(tmp_path.rglob("*.json"))
    assert str(path) in capsys.readouterr().err
    record = json.loads(path.read_text())
    assert len(records.rows_of(record)) == 7
    assert "| student" in markdown(record)


def test_grammar_tasks_have_the_exact_score_too(tmp_path: Path, folders: Path):
    grammar.write_splits(tmp_path / "grammar", "grammar", 0, 1, 1, 2)
    pair = Pair(folders / "teacher", folders / "student", tmp_path / "grammar", "cpu")
    measuring = quality.measuring_of(pair, argparse.Namespace(rows=2, seed=0))
    assert measuring.quality.headline == "joint"
    measuring.sources = [row.src for row in measuring.rows]
    found = quality.score_fields(measuring, [[row.trg] for row in measuring.rows])
    assert found["scores"]["joint"] == records.Score(1.0, 1.0, 1.0)
    assert "| joint" in frontier.table([], with_joint=True).markdown().replace("  ", " ")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ([], UsageError, "--run RUN"),
        (["--teacher", "t", "--student", "s"], UsageError, "--data-dir"),
        (["--run", "r", "--teacher", "t"], UsageError, "--run names teacher and student"),
        (["--run", "nowhere"], ModelFileError, "nowhere"),
        (["--teacher", "t", "--student", "s", "--data-dir", "nowhere"], DataError, "nowhere"),
        (["--run", "r", "--rows", "-1"], UsageError, "--rows: expected 0"),
        (["--run", "r", "--candidates", "0"], UsageError, "--candidates: expected 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        frontier.main(arguments)


def test_a_student_in_place_of_the_teacher_is_refused(folders: Path):
    arguments = named(folders)
    arguments[1] = arguments[3]
    with pytest.raises(UsageError, match="is a student, expected a teacher"):
        frontier.main([*arguments, "--device", "cpu"])


def test_systems_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch):
    measuring = measure.Measuring([], TEXT, str, seed=0, batch_size=1, bootstrap=0)
    order: list[int] = []

    def seconds(system: measure.Timed, index: int) -> float:
        order.append(system[1])
        return {1: 0.4, 2: 1.9}[system[1]]

    monkeypatch.setattr(measure, "_LATENCY_RUNS", 6)
    monkeypatch.setattr(measuring, "_seconds", seconds)
    model = tiny.generator()
    assert [len(t) for t in measuring.latencies([(model, 1, None), (model, 2, None)])] == [6, 2]
    # Two calls to see how long the short one takes, one for the long one, then turns.
    assert order == [1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2]
