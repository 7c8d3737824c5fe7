"""A run on pronunciations, from data to its table, and what its model does with bad words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import words
from tiny_training import tiny_config

from dlmone_fast import evaluate, sample
from dlmone_fast.bulk.job import Job, Options
from dlmone_fast.bulk.shards import plan_shards
from dlmone_fast.bulk.worker import ShardWriter
from dlmone_fast.comparison import compare_run
from dlmone_fast.config import Config, EvaluationConfig
from dlmone_fast.data.rows import load_rows
from dlmone_fast.errors import DataError, PromptError, UsageError
from dlmone_fast.evaluation.pronunciation import METRICS
from dlmone_fast.runtime import Generator, load_model
from dlmone_fast.tasks.arpabet import to_ipa
from dlmone_fast.tasks.g2p import score
from dlmone_fast.training import RunResult, run

_SCORES = ("wer", "per", "oracle_wer", "word_accuracy", "distinct")


def _config(folder: Path) -> Config:
    data = words.write_splits(folder / "data")
    return tiny_config(
        folder / "run",
        data_dir=str(data),
        data={"task": "g2p", "tokenizer": "aligned", "vocab_file": ""},
        distill={"selection_metric": "word_accuracy"},
    )


@pytest.fixture(scope="module")
def spoken(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A finished run. Do not write to it."""
    return run(_config(tmp_path_factory.mktemp("spoken")))


@pytest.fixture(scope="module")
def model(spoken: RunResult) -> Generator:
    assert spoken.student is not None
    return load_model(spoken.student, "cpu", "fp32", backend="eager")


def test_validation_scores_phonemes_alone(spoken: RunResult) -> None:
    lines = (spoken.root / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    scored = [record for record in records if "raw_wer" in record]
    assert scored
    for record in scored:
        assert {f"raw_{name}" for name in _SCORES} <= record.keys()
        assert record["raw_word_accuracy"] == pytest.approx(1 - record["raw_wer"])
        assert "raw_bleu" not in record


def test_the_table_has_error_rates_and_no_text_scores(spoken: RunResult) -> None:
    evaluation = EvaluationConfig(
        rows=6, teacher_steps="5", student_steps="1", teacher_rows=4, candidates=2, bootstrap=20
    )
    config = dataclasses.replace(spoken.workspace.config, evaluation=evaluation)
    workspace = dataclasses.replace(spoken.workspace, config=config)
    table = compare_run(dataclasses.replace(spoken, workspace=workspace))
    header = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    assert header == [
        "system", "NFE", "WER", "PER", "oracle WER", "distinct", "n", "ms/sample", "speed-up",
    ]  # fmt: skip
    assert "copy of the source" not in table
    assert "Oracle WER:" in table
    rows = json.loads((spoken.root / "comparison.json").read_text())["rows"]
    student = next(row for row in rows if row["system"] == "student")
    assert {*_SCORES, "intervals"} == student["scores"].keys()


def test_evaluation_counts_a_word_right_that_equals_any_reference(
    spoken: RunResult, model: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = load_rows(spoken.workspace.data_dir, "test", limit=4)
    said = model.generate([row.src for row in rows], seed=0)
    lines = [
        {"src": row.src, "trg": row.trg, "refs": [row.trg, text or "ah"]}
        for row, text in zip(rows, said, strict=True)
    ]
    data = tmp_path / "g2p"
    data.mkdir()
    (data / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [
        str(spoken.student), "--data-dir", str(data), "--bootstrap", "20", "--num-candidates", "3",
        "--backend", "eager", "--temperature", "0",
    ]  # fmt: skip
    assert evaluate.main([*options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {*METRICS, "intervals", "run"} == result.keys()
    texts = model.generate([row.src for row in rows], num_candidates=3, temperature=0, seed=1)
    references = [line["refs"] for line in lines]
    assert result["wer"] == score(references, texts)["wer"]
    assert evaluate.main(options) == 0
    printed = capsys.readouterr().out
    assert "oracle WER of 3" in printed
    assert "BLEU" not in printed
    assert "arXiv 1904.03446" in printed


def test_data_without_refs_is_scored_against_its_targets(
    spoken: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(spoken.workspace.data_dir)
    assert evaluate.main([str(spoken.student), "--data-dir", data, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run"]["rows"] == len(words.words()[1::10])
    assert result["oracle_wer"] is None


@pytest.mark.parametrize("option", ["--joint-truncation", "--mbr"])
def test_options_for_text_are_refused(spoken: RunResult, option: str) -> None:
    data = str(spoken.workspace.data_dir)
    arguments = [str(spoken.student), "--data-dir", data, "--num-candidates", "2", option]
    with pytest.raises(UsageError, match="is for tasks whose targets are text"):
        evaluate.main(arguments)


def test_a_bad_word_of_a_split_is_named_before_training(tmp_path: Path) -> None:
    config = _config(tmp_path)
    test = tmp_path / "data" / "test.jsonl"
    test.write_text('{"src": "bat", "trg": "b ah t"}\n{"src": "b4", "trg": "b"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl, line 2: '4' \(digit four\), character 2"):
        run(config)


def test_a_bad_word_of_a_split_is_named_in_evaluation(spoken: RunResult, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(
        '{"src": "bat", "trg": "b ah t"}\n{"src": "b4", "trg": "b"}\n'
    )
    with pytest.raises(DataError, match=r"test\.jsonl, line 2: '4' \(digit four\)"):
        evaluate.main([str(spoken.student), "--data-dir", str(tmp_path)])


@pytest.mark.parametrize("bad", ["", "b4t", "bat!", "zebra", "two words"])
def test_generate_names_the_prompt(model: Generator, bad: str) -> None:
    with pytest.raises(PromptError, match=r"^batch\[1\]: "):
        model.generate(["bat", bad])
    with pytest.raises(PromptError, match=r"^prompt: "):
        model.check_prompt(bad)
    with pytest.raises(PromptError, match=r"^text: "):
        model.normalize_text(bad)


def test_sample_names_the_line_and_writes_nothing(spoken: RunResult, tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("bat\nxix\nb4t\n")
    with pytest.raises(DataError, match=r"in\.txt, line 3: '4' \(digit four\), character 2"):
        sample.main([str(spoken.student), "-i", str(source), "-o", str(output)])
    assert not output.exists()
    source.write_text("bat\n\n")
    with pytest.raises(DataError, match=r"in\.txt, line 2: empty"):
        sample.main([str(spoken.student), "-i", str(source)])


def test_sample_writes_ipa(spoken: RunResult, tmp_path: Path) -> None:
    source = words.write_split(tmp_path / "in.jsonl", words.pairs()[:5])
    output = tmp_path / "out.jsonl"
    arguments = [str(spoken.student), "-i", str(source), "-o", str(output), "--ipa"]
    assert sample.main([*arguments, "--num-candidates", "2"]) == 0
    for row in _lines(output):
        assert row["ipa"] == [to_ipa(text, keep_unknown=True) for text in row["candidates"]]
    row = {"src": "bat", "ipa": "mine"}
    source.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"line 1: has 'ipa' of its own"):
        sample.main(arguments)
    assert sample.main([*arguments, "--field-prefix", "x_"]) == 0
    (kept,) = _lines(output)
    assert kept["x_ipa"] == to_ipa(kept["x_generated"], keep_unknown=True)
    assert kept == {**row, **{name: kept[name] for name in ("x_ipa", "x_generated", "x_truncated")}}
    plain = tmp_path / "out.txt"
    source = tmp_path / "in.txt"
    source.write_text("bat\n")
    arguments = [str(spoken.student), "-i", str(source), "-o", str(plain)]
    assert sample.main(arguments) == 0
    phonemes = plain.read_text().strip()
    assert sample.main([*arguments, "--ipa"]) == 0
    assert plain.read_text().strip() == to_ipa(phonemes, keep_unknown=True)


def test_bulk_counts_words_that_cannot_be_read(
    spoken: RunResult, model: Generator, tmp_path: Path
) -> None:
    texts = ["bat", "b4t", "xix", "", "zebra"]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"src": text}) + "\n" for text in texts))
    engine = ("cpu", "fp32", "eager")
    options = Options(str(spoken.student), device=engine[0], dtype=engine[1], backend=engine[2])
    job = Job(source, tmp_path / "out", options)
    job.open()
    (shard,) = plan_shards(source, 100)
    done = ShardWriter(job, model, 8).write(shard)
    assert (done.rows, done.rejected) == (2, 3)
    written = _lines(tmp_path / "out" / "part-000000.jsonl")
    assert [row["src"] for row in written] == ["bat", "xix"]
    rejects = _lines(tmp_path / "out" / "part-000000.rejects.jsonl")
    assert [reason.split(",")[0] for reason in (row["reason"] for row in rejects)] == [
        "'src': '4' (digit four)",
        "'src': empty; expected a word",
        "'src': 'z' (latin small letter z)",
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
