"""A wrong column, and fields of one's own, are told before a job begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from installed import skip_without

from dlmone_fast import generate_bulk
from dlmone_fast.bulk.columns import check_columns
from dlmone_fast.bulk.job import JOB_NAME, Job, Options
from dlmone_fast.bulk.shards import plan_shards
from dlmone_fast.bulk.worker import ShardWriter
from dlmone_fast.errors import DataError
from dlmone_fast.runtime import load_model

ADDED = Options("model").added


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        ([{"source": "ba", "n": 1}] * 3, ("src", ""), r"--column src: no row .*: source, n$"),
        ([{"src": "ba"}] * 3, ("src", "id"), r"--id-column id: no row .*: src$"),
        ([[{"src": "ba"}]], ("src", ""), r"no line is an object; in\.jsonl:0: expected an object"),
        ([{"src": "ba", "generated": 1}], ("src", ""), r"in\.jsonl:0: has 'generated' of its own"),
        (
            [{"row_id": 1, "truncated": 1, "src": ""}],
            ("src", ""),
            "'row_id' and 'truncated' .*out_",
        ),
    ],
)
def test_what_cannot_give_a_row_is_refused(tmp_path: Path, rows: Any, columns: Any, said: str):
    with pytest.raises(DataError, match=said):
        check_columns(jsonl(tmp_path / "in.jsonl", *rows), *columns, ADDED)


def test_columns_that_some_row_has_are_enough(tmp_path: Path):
    jsonl(tmp_path / "a.jsonl", [], {"text": "ba"})
    jsonl(tmp_path / "b.jsonl", {"text": "ba"}, {"src": None}, {"id": 1, "candidates": 1})
    (tmp_path / "c.jsonl").touch()
    check_columns(tmp_path, "src", "id", ADDED)
    empty = tmp_path / "c.jsonl"
    check_columns(empty, "src", "", ADDED)
    # With another prefix the names are free.
    prefixed = Options("model", field_prefix="out_", num_candidates=2).added
    assert prefixed == ("out_row_id", "out_candidates", "out_truncated")
    check_columns(jsonl(tmp_path / "d.jsonl", {"src": "", "row_id": 1}), "src", "", prefixed)


def test_parquet_columns_are_those_of_its_schema(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"text": ["ba"], "truncated": [1]}), file)
    with pytest.raises(DataError, match=r"'truncated' of its own"):
        check_columns(file, "src", "", ADDED)
    with pytest.raises(DataError, match=r"--column src: no row .*: text, truncated$"):
        check_columns(file, "src", "", ("out_truncated",))
    twice = pyarrow.table([pyarrow.array(["ba"]), pyarrow.array(["be"])], names=["src", "src"])
    parquet.write_table(twice, file)
    with pytest.raises(DataError, match="the column 'src' more than once"):
        check_columns(file, "src", "", ADDED)


def test_a_later_row_s_own_fields_are_a_reason_and_kept_under_a_prefix(tmp_path: Path):
    model = tiny.save(tmp_path / "model")
    rows = [{"src": "ba"}, {"src": "be", "generated": "mine"}, {"src": "bi", "truncated": 0}]
    source = jsonl(tmp_path / "in.jsonl", *rows)
    generator = load_model(model, "cpu", "fp32", backend="eager")

    def written(output: Path, **options: Any) -> list[dict[str, Any]]:
        job = Job(source, output, Options(str(model), **options))
        job.open()
        ShardWriter(job, generator, 8).write(plan_shards(source, 10)[0])
        return [json.loads(line) for line in (output / "part-000000.jsonl").open()]

    assert [row["src"] for row in written(tmp_path / "a")] == ["ba"]
    lines = (tmp_path / "a" / "part-000000.rejects.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert [reason.partition(" of its own")[0] for reason in reasons] == [
        "has 'generated'", "has 'truncated'",
    ]  # fmt: skip
    kept = written(tmp_path / "b", field_prefix="out_")
    assert [{k: row[k] for k in given} for row, given in zip(kept, rows, strict=True)] == rows
    assert all(isinstance(row["out_generated"], str) for row in kept)
    # A job that an earlier version began has no such option, and goes on.
    file = tmp_path / "a" / JOB_NAME
    described = json.loads(file.read_text())
    del described["options"]["field_prefix"]
    file.write_text(json.dumps(described))
    Job(source, tmp_path / "a", Options(str(model))).open()


def test_a_job_that_rejected_every_row_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    skip_without("ray")
    model = tiny.save(tmp_path / "model")
    source, output = jsonl(tmp_path / "in.jsonl", {"src": None}, {"src": 3}), tmp_path / "out"

    def made_here(job: Job, missing: Any, **_: Any) -> Any:
        generator = load_model(model, "cpu", "fp32", backend="eager")
        for shard in missing:
            ShardWriter(job, generator, 8).write(shard)
            yield shard.index

    monkeypatch.setattr("dlmone_fast.bulk.on_ray.run_on_ray", made_here)
    command = [str(source), str(output), "--model", str(model), "--backend", "eager"]
    # Again with all shards done: it is no success either.
    for _ in range(2):
        with pytest.raises(DataError, match=r"every row was rejected.*in\.jsonl:0: 'src' is no"):
            generate_bulk.main([*command, "--device", "cpu"])
        assert "0 rows written, 2 rejected" in capsys.readouterr().err
    with pytest.raises(DataError, match="--column text: no row"):
        generate_bulk.main([*command, "--device", "cpu", "--column", "text"])
