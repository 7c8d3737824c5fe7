"""Reading sentence pairs: good files, and every bad one with its file, line and reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dlmone_fast.data.rows import Row, find_split, load_rows, read_rows
from dlmone_fast.errors import DataError, UsageError

GOOD = json.dumps({"src": " the kettle boils ", "trg": "water is hot\n", "id": 4}).encode()


def _file(directory: Path, *lines: bytes, name: str = "train.jsonl") -> Path:
    path = directory / name
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_rows_are_stripped_and_numbered(tmp_path: Path) -> None:
    rows = list(read_rows(_file(tmp_path, GOOD, GOOD)))
    assert rows == [Row("the kettle boils", "water is hot", line) for line in (1, 2)]
    assert rows[0].references == ("water is hot",)


def test_further_references_are_kept(tmp_path: Path) -> None:
    line = json.dumps({"src": "a", "trg": "b", "refs": ["b ", "c"]}).encode()
    (row,) = read_rows(_file(tmp_path, line))
    assert row.references == ("b", "c")


def test_gzip_and_plain_read_alike_and_plain_wins(tmp_path: Path) -> None:
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(GOOD + b"\n" + GOOD))
    assert find_split(tmp_path, "train") == packed
    assert len(load_rows(tmp_path, "train")) == 2
    plain = _file(tmp_path, GOOD)
    assert find_split(tmp_path, "train") == plain


def test_the_last_line_may_lack_its_newline_and_lines_may_end_in_crlf(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_bytes(GOOD + b"\r\n" + GOOD)
    assert [row.line for row in load_rows(tmp_path, "valid")] == [1, 2]


def test_reading_is_lazy(tmp_path: Path) -> None:
    _file(tmp_path, GOOD, GOOD, b"broken")
    assert len(load_rows(tmp_path, "train", limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"", "blank line"),
        (b"   ", "blank line"),
        (b"[1]", "expected an object, got list"),
        (b"null", "expected an object, got NoneType"),
        (b'{"src": "a"}', "'trg' is missing"),
        (b'{"src": "a", "trg": null}', "'trg' is null"),
        (b'{"src": "a", "trg": "b", "refs": [null]}', r"'refs\[0\]' is null"),
        (b'{"src": 1, "trg": "b"}', "'src': expected a string, got int"),
        (b'{"src": " ", "trg": "b"}', "'src' is empty"),
        (b'{"src": "\\ud800", "trg": "b"}', "lone surrogate"),
        (b'{"src": "\xff", "trg": "b"}', "not UTF-8"),
        (b'{"src": "a", "trg": "b", "refs": "c"}', "'refs': expected a list"),
        (b'{"src": "a", "trg": "b", "refs": [3]}', r"refs\[0\]"),
        (b"[" * 200_000, "nested too deeply|not JSON"),
        (b'{"src": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_malformed_rows_name_file_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = _file(tmp_path, GOOD, line, GOOD)
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2: .*({reason}).*correct or remove"):
        list(read_rows(path))


def test_an_endless_line_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlmone_fast.data.rows.MAX_LINE_BYTES", 1000)
    path = _file(tmp_path, GOOD, b'{"src": "' + b"a" * 5000 + b'"}')
    with pytest.raises(DataError, match="line 2: longer than 1000 bytes"):
        list(read_rows(path))


def test_empty_splits_raise(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_bytes(b"")
    (tmp_path / "valid.jsonl.gz").write_bytes(gzip.compress(b""))
    for split in ("test", "valid"):
        with pytest.raises(DataError, match=rf"{split}\.jsonl.*empty"):
            load_rows(tmp_path, split)


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
def test_damaged_gzip_files_raise(tmp_path: Path, damage: str) -> None:
    lines = [json.dumps({"src": f"word {i * 7919}", "trg": f"w {i}"}) for i in range(2000)]
    packed = bytearray(gzip.compress("\n".join(lines).encode()))
    if damage == "cut":
        del packed[len(packed) // 2 :]
    elif damage == "flipped":
        packed[-6] ^= 1
    else:
        packed = bytearray(GOOD)
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"train\.jsonl\.gz: cannot be read beyond line"):
        list(read_rows(path))


def test_missing_folders_and_splits_raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        find_split(tmp_path / "none", "train")
    with pytest.raises(DataError, match=r"neither train\.jsonl nor train\.jsonl\.gz"):
        find_split(tmp_path, "train")
    with pytest.raises(UsageError, match="split"):
        find_split(tmp_path, "dev")
