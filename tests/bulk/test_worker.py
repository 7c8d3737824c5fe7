"""What is written for a row depends on the row and the job, and each row is written once."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import words

from dlmone_fast.aligned_tokenizer import AlignedTokenizer
from dlmone_fast.bulk.job import Job, Options
from dlmone_fast.bulk.shards import plan_shards, read_shard
from dlmone_fast.bulk.worker import ShardWriter, id_seed, total
from dlmone_fast.errors import DataError, ModelFileError, UsageError
from dlmone_fast.runtime import Generator, load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("bulk") / "model")


@pytest.fixture(scope="module")
def generator(model: Path) -> Generator:
    return load_model(model, "cpu", "fp32", backend="eager")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Thirty rows, two of them bad, one too long for the model."""
    rows: list[Any] = [{"src": text, "id": f"r{n}"} for n, text in enumerate(tiny.prompts(30))]
    rows[7] = {"src": None, "id": "r7"}
    rows[11] = ["no object"]
    rows[20]["src"] = "ba " * 40
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def made(
    source: Path, output: Path, model: Path, generator: Generator, batch: int, **options: Any
) -> list[dict[str, Any]]:
    job = Job(source, output, Options(str(model), **options))
    job.open()
    writer = ShardWriter(job, generator, batch)
    for shard in job.missing(plan_shards(source, job.options.rows_per_shard)):
        writer.write(shard)
    parts = sorted(output.glob("part-*.jsonl"))
    texts = [part.read_text() for part in parts if "rejects" not in part.name]
    return [json.loads(line, parse_constant=refuse) for line in "".join(texts).splitlines()]


def test_batches_and_shards_do_not_change_what_is_written(
    source: Path, tmp_path: Path, model: Path, generator: Generator
):
    one = made(source, tmp_path / "a", model, generator, 64)
    assert [row["id"] for row in one] == [f"r{n}" for n in range(30) if n not in (7, 11)]
    assert one == made(source, tmp_path / "b", model, generator, 3, rows_per_shard=4)
    assert [row["truncated"] for row in one].count(True) >= 1
    assert one[18]["truncated"]


def test_an_id_gives_a_row_its_noise_wherever_it_stands(
    source: Path, tmp_path: Path, model: Path, generator: Generator
):
    rows = source.read_text().splitlines(keepends=True)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(reversed(rows)))
    one = made(source, tmp_path / "a", model, generator, 8, id_column="id")
    other = made(mixed, tmp_path / "b", model, generator, 8, id_column="id")
    assert {r["id"]: r["generated"] for r in one} == {r["id"]: r["generated"] for r in other}
    assert id_seed(0, "a") != id_seed(1, "a") != id_seed(1, "b")


def test_rejects_say_which_row_and_why(
    source: Path, tmp_path: Path, model: Path, generator: Generator
):
    made(source, tmp_path / "out", model, generator, 8)
    lines = (tmp_path / "out" / "part-000000.rejects.jsonl").read_text().splitlines()
    rejects = [json.loads(line) for line in lines]
    assert [tuple(row.values()) for row in rejects] == [
        ("in.jsonl:7", "'src' is no string", '{"src": null, "id": "r7"}'),
        ("in.jsonl:11", "expected an object, got ['no object']", '["no object"]'),
    ]


def test_words_that_a_model_of_words_cannot_read_are_rejects(tmp_path: Path, model: Path):
    tokenizer = AlignedTokenizer.learn(words.pairs())
    network = tiny.denoiser(vocab_size=tokenizer.vocab_size)
    spoken = Generator(network, tokenizer, tiny.settings())
    source = tmp_path / "in.jsonl"
    rows = [{"word": "bat"}, {"word": "b4t"}, {"word": ""}, {"word": "xix", "truncated": 0}]
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"word": "shim"}]))
    written = made(source, tmp_path / "out", model, spoken, 8, column="word")
    assert [row["word"] for row in written] == ["bat", "shim"]
    lines = (tmp_path / "out" / "part-000000.rejects.jsonl").read_text().splitlines()
    reasons = {row["id"]: row["reason"] for row in map(json.loads, lines)}
    assert reasons.keys() == {"in.jsonl:1", "in.jsonl:2", "in.jsonl:3"}
    assert reasons["in.jsonl:1"].startswith("'word': '4' (digit four), character 2 of 'b4t'")
    assert reasons["in.jsonl:2"].startswith("'word': empty")
    assert reasons["in.jsonl:3"].startswith("has 'truncated' of its own")


def test_parquet_types_beyond_json_are_written_as_text_and_null(
    tmp_path: Path, model: Path, generator: Generator
):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({
        "src": ["ba", None, "be"],
        "day": [datetime.date(2026, 11, 22)] * 3,
        "price": [decimal.Decimal("1.50")] * 3,
        "raw": [b"\xff\x00"] * 3,
        "score": [math.nan, math.inf, 0.5],
        "nested": [[{"x": -math.inf}], [{"x": math.nan}], [{"x": 1.0}]],
    })  # fmt: skip
    source = tmp_path / "typed.parquet"
    parquet.write_table(table, source)
    rows = made(source, tmp_path / "out", model, generator, 8)
    rejected = (tmp_path / "out" / "part-000000.rejects.jsonl").read_text()
    shown = json.loads(json.loads(rejected)["row"], parse_constant=refuse)
    assert [row["score"] for row in [*rows, shown]] == [None, 0.5, None]
    assert [row["nested"][0]["x"] for row in [*rows, shown]] == [None, 1.0, None]
    for row in [*rows, shown]:
        assert (row["day"], row["price"], row["raw"]) == ("2026-11-22", "1.50", r"b'\xff\x00'")
    # The project's own reader takes what was written.
    written = tmp_path / "out" / "part-000000.jsonl"
    again = [row for shard in plan_shards(written, 10) for row in read_shard(shard, "src", "")]
    assert [row.reason for row in again] == ["", ""]


def test_a_number_beyond_floats_is_written_as_null(
    tmp_path: Path, model: Path, generator: Generator
):
    source = tmp_path / "in.jsonl"
    source.write_text('{"src": "ba", "n": 1e999}\n')
    (row,) = made(source, tmp_path / "out", model, generator, 8)
    assert row["n"] is None


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_only_what_is_missing_is_made_again(
    source: Path, tmp_path: Path, model: Path, generator: Generator
):
    out = tmp_path / "out"
    whole = made(source, out, model, generator, 8, rows_per_shard=10)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    # As a kill leaves it: a part without its proof, and a temporary file.
    (out / "part-000001.done.json").unlink()
    (out / "part-000001.jsonl").write_text("torn")
    again = made(source, out, model, generator, 5, rows_per_shard=10)
    assert again == whole
    after = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {n for n in after if n.startswith("part-000001.")}


def test_counts_add_up(source: Path, tmp_path: Path, model: Path, generator: Generator):
    made(source, tmp_path / "out", model, generator, 8, rows_per_shard=10)
    job = Job(source, tmp_path / "out", Options(str(model), rows_per_shard=10))
    found = total(job.done(shard) for shard in plan_shards(source, 10))
    assert (found.rows, found.rejected) == (28, 2)


def test_another_job_does_not_write_into_the_folder(
    source: Path, tmp_path: Path, model: Path, generator: Generator
):
    out = tmp_path / "out"
    made(source, out, model, generator, 8)
    with pytest.raises(UsageError, match="another seed"):
        Job(source, out, Options(str(model), seed=1)).open()
    with source.open("a") as file:
        file.write('{"src": "ba"}\n')
    with pytest.raises(UsageError, match="another input"):
        Job(source, out, Options(str(model))).open()
    other = tiny.save(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="another input and model"):
        Job(source, out, Options(str(other))).open()


@pytest.mark.parametrize(
    ("option", "other"),
    [("device", "cuda"), ("dtype", "bf16"), ("backend", "openvino"), ("temperature", 0.5)],
)
def test_a_job_goes_on_only_as_it_began(
    source: Path, tmp_path: Path, model: Path, generator: Generator, option: str, other: Any
):
    out = tmp_path / "out"
    made(source, out, model, generator, 8)
    with pytest.raises(UsageError, match=rf"another {option} \({option} \w+, not {other}\);"):
        Job(source, out, Options(str(model), **{option: other})).open()


def test_a_worker_that_runs_otherwise_than_its_job_writes_nothing(
    source: Path, tmp_path: Path, model: Path, generator: Generator
):
    job = Job(source, tmp_path / "out", Options(str(model), device="cuda", dtype="bf16"))
    job.open()
    with pytest.raises(UsageError, match=r"on cuda, bf16, eager, .* got one on cpu, fp32, eager"):
        ShardWriter(job, generator, 8)


def test_temperature_changes_what_is_written(
    source: Path, tmp_path: Path, model: Path, generator: Generator
):
    rows = made(source, tmp_path / "a", model, generator, 8, temperature=0.0, num_candidates=2)
    # Without noise a source has one text.
    assert all(len(set(row["candidates"])) == 1 for row in rows)
    rows = made(source, tmp_path / "b", model, generator, 8, num_candidates=2)
    assert any(len(set(row["candidates"])) == 2 for row in rows)


def test_a_model_that_is_none_is_named_before_the_folder_is_made(source: Path, tmp_path: Path):
    with pytest.raises(ModelFileError, match="missing: no such folder"):
        Job(source, tmp_path / "out", Options(str(tmp_path / "missing"))).open()
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(source: Path, tmp_path: Path, model: Path):
    with pytest.raises(UsageError, match=r"holds files and no job\.json"):
        Job(source, tmp_path, Options(str(model))).open()


def test_an_output_that_cannot_be_written_is_named(
    source: Path, tmp_path: Path, model: Path, generator: Generator, monkeypatch: Any
):
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    job = Job(source, tmp_path / "out", Options(str(model)))
    job.open()
    monkeypatch.setattr("dlmone_fast.bulk.job.write_atomically", full)
    with pytest.raises(DataError, match=r"No space left on device.*free space"):
        ShardWriter(job, generator, 8).write(plan_shards(source, 100)[0])
    assert job.missing(plan_shards(source, 100))
