"""Shards hold every row of an input once, whatever its lines and files look like."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from dlmone_fast.bulk.shards import MAX_LINE_BYTES, InputRow, Shard, plan_shards, read_shard
from dlmone_fast.errors import DataError


def rows_of(path: Path, size: int, column: str = "src", id_column: str = "") -> list[InputRow]:
    shards = plan_shards(path, size)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    return [row for shard in shards for row in read_shard(shard, column, id_column)]


def lines(count: int, seed: int) -> list[str]:
    numbers = random.Random(seed)
    return [json.dumps({"src": "ä" * numbers.randint(0, 90), "n": n}) for n in range(count)]


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("between", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_every_line_of_a_jsonl_file_is_in_one_shard(
    tmp_path: Path, end: str, between: str, size: int, monkeypatch: pytest.MonkeyPatch
):
    # Blocks so small that lines lie across them.
    monkeypatch.setattr("dlmone_fast.bulk.shards._READ_BYTES", 64)
    file = tmp_path / "a.jsonl"
    file.write_bytes((between.join(lines(21, size)) + end).encode())
    found = rows_of(file, size)
    assert [row.fields["n"] for row in found] == list(range(21))
    assert [row.id for row in found] == [f"a.jsonl:{n}" for n in range(21)]
    assert len(plan_shards(file, size)) == -(-21 // size)


def test_a_folder_is_read_in_order_of_names_and_a_gz_file_is_one_shard(tmp_path: Path):
    (tmp_path / "b.jsonl").write_text("\n".join(lines(5, 0)))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines(7, 1)))
    (tmp_path / "notes.txt").write_text("not a row")
    shards = plan_shards(tmp_path, 2)
    assert [Path(shard.file).name for shard in shards] == ["a.jsonl.gz"] + ["b.jsonl"] * 3
    assert [row.fields["n"] for row in rows_of(tmp_path, 2)] == [*range(7), *range(5)]


@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_parquet_rows_come_from_their_row_groups(tmp_path: Path, size: int):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"t{n}" for n in range(13)], "key": list(range(13))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    found = rows_of(tmp_path, size, "text", "key")
    assert [row.source for row in found] == [f"t{n}" for n in range(13)]
    assert [row.id for row in found] == [str(n) for n in range(13)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "expected an object"),
        (b'{"src": NaN}', "NaN is not allowed"),
        (b'{"src": "\xff"}', "not UTF-8"),
        (rb'{"src": "\ud800"}', "lone surrogate"),
        (b'{"a": "x"}', "'src' is no string"),
        (b'{"src": 3}', "'src' is no string"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"src": "' + b"x" * MAX_LINE_BYTES + b'"}', "longer than"),
    ],
)
def test_a_bad_row_says_why_and_the_next_one_is_read(tmp_path: Path, line: bytes, reason: str):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"src": "x"}\n' + line + b'\n{"src": "y"}\n')
    first, bad, last = rows_of(file, 100)
    assert (first.source, first.reason, last.source, last.reason) == ("x", "", "y", "")
    assert reason in bad.reason
    assert last.id == "a.jsonl:2"


def test_an_id_column_names_rows_and_rejects_those_without_one(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"src": "x", "id": 7}\n{"src": "y"}\n{"src": "z", "id": true}\n')
    good, missing, wrong = rows_of(file, 100, id_column="id")
    assert good.id == "7"
    assert "'id' is no string or whole number" in missing.reason
    assert missing.reason == wrong.reason


def test_a_line_that_is_no_row_is_shown(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"src": "x"\n\n"caf\xe9"\r\n[' + b"1" * 5000 + b"]\n" + b'{"src": "y"}\n')
    rows = rows_of(file, 100)
    assert [row.line for row in rows] == ['{"src": "x"', "", '"caf\\xe9"', "[" + "1" * 3999, None]
    assert [bool(row.reason) for row in rows] == [True, True, True, True, False]


def test_an_input_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="not found"):
        plan_shards(tmp_path / "missing.jsonl", 1)
    with pytest.raises(DataError, match=r"expected \.jsonl"):
        plan_shards(tmp_path, 1)
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        plan_shards(tmp_path, 1)


def test_a_damaged_gz_file_ends_the_shard_with_its_row(tmp_path: Path):
    content = gzip.compress("\n".join(lines(500, 3)).encode())
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read beyond row \d+"):
        list(read_shard(Shard(0, str(file)), "src", ""))


def test_a_parquet_string_that_is_none_costs_its_own_row_alone(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    wrong = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"src": wrong}), file)
    good, bad = read_shard(Shard(0, str(file), count=2), "src", "")
    assert (good.source, good.reason) == ("fine", "")
    assert (bad.reason, bad.fields) == ("'src' is no Unicode text", {"src": "caf\\xe9"})


def test_parquet_values_that_python_cannot_hold_are_text(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    far = pyarrow.array([0, 2**62], pyarrow.timestamp("us"))
    table = pyarrow.table({
        "src": ["ba", "be"],
        "seen": far,
        "day": pyarrow.array([0, 2**31 - 1], pyarrow.date32()),
        "took": pyarrow.array([1, 2**62], pyarrow.duration("s")),
        "zone": far.cast(pyarrow.timestamp("us", "Nowhere/Never")),
        "nested": pyarrow.StructArray.from_arrays([far, pyarrow.array([1, 2])], ["at", "n"]),
        "list": pyarrow.ListArray.from_arrays([0, 1, 2], far),
        "name": pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string()),
        "fine": [1, None],
    })  # fmt: skip
    file = tmp_path / "a.parquet"
    parquet.write_table(table, file)
    good, odd = read_shard(Shard(0, str(file), count=2), "src", "")
    assert [row.reason for row in (good, odd)] == ["", ""]
    assert [row.source for row in (good, odd)] == ["ba", "be"]
    assert good.fields["seen"].year == 1970
    text = f"{2**62} (timestamp[us])"
    assert odd.fields == {
        "src": "be", "seen": text, "day": f"{2**31 - 1} (date32[day])",
        "took": f"{2**62} (duration[s])", "zone": f"{2**62} (timestamp[us, tz=Nowhere/Never])",
        "nested": {"at": text, "n": 2}, "list": [text], "name": "caf\\xe9", "fine": None,
    }  # fmt: skip


def test_nesting_that_could_not_be_written_again_is_a_reason(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    deep, flat = "[" * 400 + "]" * 400, "[" + "[]," * 400 + "1]"
    file.write_text(f'{{"src": "x", "d": {deep}, "n": 1e999}}\n{{"src": "y", "d": {flat}}}\n')
    assert [row.reason for row in rows_of(file, 100)] == ["nested too deeply", ""]
