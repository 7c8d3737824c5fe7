"""A run removes and replaces what is proven to be a run's, and nothing by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dlmone_fast import train
from dlmone_fast.config import Config, load_toml
from dlmone_fast.errors import ConfigError, DataError, DlmOneError, UsageError
from dlmone_fast.models.folder import load_folder
from dlmone_fast.tokenizer import Tokenizer
from dlmone_fast.training import RunResult, distill, run, train_teacher
from dlmone_fast.training.owned import RECORD_NAME
from dlmone_fast.training.workspace import open_workspace

Make = Callable[..., Config]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but those that a start itself makes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def rows(finished: RunResult, tmp_path: Path) -> Path:
    """A folder of rows."""
    folder = tmp_path / "rows"
    shutil.copytree(finished.root / "data", folder)
    return folder


@pytest.fixture
def on_rows(tiny: Make, rows: Path, tmp_path: Path) -> Make:
    """The tiny run on the rows, with a learnt vocabulary; two steps."""

    def make(**data: object) -> Config:
        text = {"task": "custom", "vocab_size": 300, **data}
        return tiny(tmp_path / "run", data_dir=str(rows), data=text, teacher={"steps": 2})

    return make


@pytest.fixture
def trained(tiny: Make, tmp_path: Path) -> Config:
    """A teacher of two steps."""
    config = tiny(tmp_path / "run", teacher={"steps": 2})
    train_teacher(config)
    return config


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_of_the_users_is_left_as_it_is(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(rows, mine / "data")
    (mine / "config.toml").write_text('preset = "qqp-small"\n[teacher]\nsteps = 2\n')
    for name in ("checkpoints/my.pt", "teacher/notes.txt", "tokenizer.json", "metrics.jsonl"):
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text("mine")
    before = contents(mine)
    monkeypatch.chdir(mine)
    command = ["--config", "config.toml", "--data-dir", "data", "--output-dir", "."]
    with pytest.raises(UsageError, match=r"teacher: holds notes\.txt and no manifest") as caught:
        train.main([*command, "--resume", resume])
    assert "never" not in str(caught.value)
    assert contents(mine) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.toml", "is not a configuration that a run|was not written by a run"),
        ("tokenizer.json", "was not written by a run"),
        ("metrics.jsonl", "was not written by a run"),
        ("comparison.json", "was not written by a run"),
        ("run.json", "is not the record of a run"),
        ("data/train.jsonl", "was not written by a run"),
        ("stage2/notes.txt", "holds notes.txt and no manifest.json"),
        ("stage1", "is a file, so that no run wrote it"),
        ("checkpoints", "is no folder"),
        (".lock", "was not written by a training"),
    ],
)
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_what_no_run_wrote_is_neither_removed_nor_replaced(
    tiny: Make, tmp_path: Path, name: str, message: str, resume: str
) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(DlmOneError, match=message) as caught:
        train_teacher(tiny(tmp_path / "run"), resume=resume)
    assert str(tmp_path / "run") in str(caught.value)
    assert "never" not in str(caught.value)
    assert file.read_text() == "mine"
    assert set(contents(tmp_path / "run")) <= {name}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.toml", "was changed after the run wrote it"),
        ("tokenizer.json", "was changed after the run wrote it"),
        ("data/valid.jsonl", "was changed after the run wrote it"),
        ("metrics.jsonl", "was not written by a run"),
        ("teacher/README.md", "teacher: is not as a run wrote it"),
        ("teacher/notes.txt", "teacher: holds notes.txt, which no run wrote"),
        ("checkpoints/teacher/step-00000002/notes.txt", "holds notes.txt, which no run wrote"),
        ("checkpoints/teacher/step-00000009/mine", "step-00000009: is not as a run wrote it"),
    ],
)
def test_starting_over_removes_nothing_where_the_user_has_changed_something(
    trained: Config, name: str, message: str
) -> None:
    file = Path(trained.output_dir) / name
    file.parent.mkdir(exist_ok=True)
    text = file.read_text() if file.exists() else ""
    file.write_text(f"# mine\n{text}")
    before = contents(Path(trained.output_dir))
    with pytest.raises(UsageError, match=message):
        train_teacher(trained, resume="never")
    assert contents(Path(trained.output_dir)) == before


def test_what_lies_beside_a_runs_files_survives_starting_over(trained: Config) -> None:
    root = Path(trained.output_dir)
    mine = ("notes.txt", "data/mine.jsonl", "checkpoints/my.pt", "checkpoints/teacher/my.pt")
    for name in mine:
        (root / name).write_text("mine")
    first = load_folder(root / "teacher").tensors
    train_teacher(trained, resume="never")
    assert [(root / name).read_text() for name in mine] == ["mine"] * 4
    again = load_folder(root / "teacher").tensors
    assert all(first[name].equal(again[name]) for name in first)
    steps = [json.loads(line)["step"] for line in (root / "metrics.jsonl").open()]
    assert steps == sorted(steps)


def test_starting_over_is_checked_before_anything_is_removed(trained: Config, tiny: Make) -> None:
    root = Path(trained.output_dir)
    before = contents(root)
    wrong = tiny(root, teacher={"steps": 2}, model={"vocab_size": 700})
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 700, the tokenizer has"):
        train_teacher(wrong, resume="never")
    assert contents(root) == before


def test_distilling_anew_removes_no_folder_of_the_users(trained: Config) -> None:
    root = Path(trained.output_dir)
    (root / "stage1").mkdir()
    (root / "stage1" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"stage1: holds notes\.txt"):
        distill(trained, resume="never")
    assert (root / "stage1" / "notes.txt").read_text() == "mine"


def test_rows_and_a_configuration_in_the_run_folder_are_never_touched(
    rows: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    small = ["--model.hidden-size", "32", "--model.num-heads", "2", "--model.num-layers", "1",
             "--model.ffn-size", "64", "--teacher.steps", "2", "--teacher.batch-size", "8",
             "--teacher.warmup-steps", "1", "--data.vocab-size", "300"]  # fmt: skip
    command = ["--output-dir", str(root), "--phase", "teacher"]
    train.main(["--preset", "qqp-small", "--data-dir", str(rows), *small, *command])
    shutil.copytree(rows, root / "data")
    shutil.copy(root / "config.toml", root / "mine.toml")
    before = contents(root)
    given = ["--data-dir", str(root / "data"), *command, "--resume", "never"]
    train.main(["--config", str(root / "mine.toml"), *given])
    after = contents(root)
    for name in before:
        if name == "mine.toml" or name.startswith("data/"):
            assert after[name] == before[name]
    # The run's own file is one too: it stays where it says what is run, and is not written over.
    own = (root / "config.toml").read_bytes()
    train.main(["--config", str(root / "config.toml"), *given])
    assert (root / "config.toml").read_bytes() == own
    with pytest.raises(UsageError, match=r"config\.toml: is given to this run"):
        train.main(["--config", str(root / "config.toml"), *given, "--seed", "4"])
    assert (root / "config.toml").read_bytes() == own
    assert (root / "teacher").is_dir()


def test_a_run_of_a_version_without_record_resumes(
    tiny: Make, tmp_path: Path, finished: RunResult
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished.root, root)
    (root / RECORD_NAME).unlink()
    shutil.rmtree(root / "stage2")
    shutil.rmtree(root / "checkpoints" / "stage2")
    student = run(tiny(root)).student
    expected = load_file(finished.root / "stage2" / "model.safetensors")
    assert student is not None
    assert all(t.equal(expected[k]) for k, t in load_file(student / "model.safetensors").items())
    assert (root / RECORD_NAME).is_file()
    # Proven by its checkpoints, it can be started over as well.
    (root / RECORD_NAME).unlink()
    train_teacher(tiny(root, teacher={"steps": 2}), resume="never")
    assert not (root / "stage1").exists()


def test_a_run_that_died_before_its_first_checkpoint_resumes(tiny: Make, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", teacher={"steps": 2})
    open_workspace(config)
    (tmp_path / "run" / RECORD_NAME).unlink()
    assert train_teacher(config).is_dir()


def test_a_foreign_teacher_in_the_run_folder_is_found_before_training(
    tiny: Make, tmp_path: Path, finished: RunResult
) -> None:
    shutil.copytree(finished.root / "stage1", tmp_path / "run" / "teacher")
    with pytest.raises(UsageError, match="the phase teacher of a run did not write"):
        train_teacher(tiny(tmp_path / "run"))


def test_a_refused_vocabulary_leaves_no_tokenizer(on_rows: Make) -> None:
    config = on_rows()
    wrong = replace(config, model=replace(config.model, vocab_size=299))
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 299, the tokenizer has \d+"):
        train_teacher(wrong)
    assert contents(Path(config.output_dir)) == {}
    assert train_teacher(config).is_dir()


def test_a_tokenizer_does_not_outlive_what_it_was_made_from(on_rows: Make, rows: Path) -> None:
    # Before anything is trained, a tokenizer of other settings or other text is made anew.
    root = Path(on_rows().output_dir)
    open_workspace(on_rows())
    for change in ({"vocab_size": 100}, {"vocab_size": 300, "lowercase": False}):
        (root / "config.toml").unlink()
        workspace = open_workspace(on_rows(**change))
        expected = Tokenizer.learn(
            [text for line in (rows / "train.jsonl").open() for text in json.loads(line).values()],
            change["vocab_size"], bool(change.get("lowercase", True)),
        )  # fmt: skip
        assert workspace.tokenizer.vocabulary == expected.vocabulary
        saved = Tokenizer.from_file(root / "tokenizer.json")
        assert saved.hash == expected.hash
        assert load_toml(root / "config.toml")["data"]["vocab_size"] == change["vocab_size"]
    text = (rows / "train.jsonl").read_text()
    (rows / "train.jsonl").write_text(text + '{"src": "zebra zebra", "trg": "zebra zebra"}\n' * 50)
    workspace = open_workspace(on_rows(**change))
    assert "zebra" in workspace.tokenizer.vocabulary


def test_a_tokenizer_that_a_model_needs_is_not_made_anew(on_rows: Make, rows: Path) -> None:
    config = on_rows()
    train_teacher(config)
    saved = (Path(config.output_dir) / "tokenizer.json").read_bytes()
    with (rows / "train.jsonl").open("a") as file:
        file.write('{"src": "zebra", "trg": "zebra"}\n')
    with pytest.raises(ConfigError, match=r"tokenizer\.json: was made from another text than"):
        train_teacher(config)
    assert (Path(config.output_dir) / "tokenizer.json").read_bytes() == saved


def test_generated_rows_do_not_outlive_their_seed(tiny: Make, tmp_path: Path) -> None:
    root = tmp_path / "run"
    open_workspace(tiny(root))
    first = (root / "data" / "train.jsonl").read_bytes()
    # As a start that was refused after it had written rows.
    (root / "config.toml").unlink()
    open_workspace(tiny(root, seed=1))
    assert (root / "data" / "train.jsonl").read_bytes() != first


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_every_split_is_read_before_the_run_begins(on_rows: Make, rows: Path, split: str) -> None:
    config = on_rows()
    with (rows / f"{split}.jsonl").open("a") as file:
        file.write(json.dumps({"src": "a " * 12_004, "trg": "b"}) + "\n")
    for start in (lambda: run(config), lambda: train_teacher(config)):
        with pytest.raises(DataError, match=rf"{split}\.jsonl, line \d+: 24007 characters"):
            start()
    assert not Path(config.output_dir).exists()
