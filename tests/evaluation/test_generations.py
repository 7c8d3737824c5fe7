from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dlmone_fast.errors import DataError
from dlmone_fast.evaluation.generations import clean_text, read_generations, write_generations

ROW = {"recover": "a b", "reference": "a c", "source": "a d"}


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_clean_up_is_diffuseqs() -> None:
    # Stripped before the marks go, so the inner spaces stay.
    assert clean_text(" [CLS] a b [SEP] [SEP] \n") == " a b  "
    assert clean_text("a [PAD][PAD]") == "a [PAD][PAD]"
    assert clean_text("a [PAD][PAD]", drop_padding=True) == "a "


def test_files_of_several_seeds_become_candidates(tmp_path: Path) -> None:
    first = write(
        tmp_path / "1.jsonl",
        {"recover": "[CLS] x [SEP] [PAD]", "reference": "[CLS] r [SEP]", "source": "[CLS] s [SEP]"},
        ROW,
    )
    second = tmp_path / "2.jsonl.gz"
    second.write_bytes(
        gzip.compress(first.read_bytes().replace(b"[CLS] x", b"[CLS] y").replace(b"a b", b"q"))
    )
    texts = read_generations([first, second])
    assert texts.sources == [" s ", "a d"]
    assert texts.references == [" r ", "a c"]
    assert texts.candidates == [[" x  ", "a b"], [" y  ", "q"]]


def test_written_files_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "seed0.jsonl"
    texts = (["é\u2028 s", 's "2"'], ["r1", "r2"], ["g1", ""])
    write_generations(path, *texts)
    found = read_generations([path])
    assert (found.sources, found.references, found.candidates) == (texts[0], texts[1], [texts[2]])
    assert [entry.name for entry in path.parent.iterdir()] == ["seed0.jsonl"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "expected one JSON object"),
        ("", "empty line"),
        ("[1]", "expected a JSON object, got list"),
        ('{"recover": "a", "source": "b"}', "'reference': expected a string, it is missing"),
        (
            '{"recover": 3, "source": "b", "reference": "c"}',
            "'recover': expected a string, got int",
        ),
        ('{"recover": "\\ud800", "source": "b", "reference": "c"}', "lone surrogate"),
    ],
)
def test_malformed_rows_name_file_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "bad.jsonl", ROW, line)
    with pytest.raises(DataError, match=reason) as caught:
        read_generations([path])
    assert f"{path}, line 2" in str(caught.value)


def test_text_that_is_not_utf8_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"recover": "\xe9"}\n')
    with pytest.raises(DataError, match="line 2: expected one JSON object in UTF-8"):
        read_generations([path])


def test_other_rows_in_a_second_file_are_refused(tmp_path: Path) -> None:
    other = {**ROW, "source": "z"}
    first = write(tmp_path / "1.jsonl", ROW, other)
    swapped = write(tmp_path / "2.jsonl", other, ROW)
    with pytest.raises(DataError, match=r"2\.jsonl, line 1: its source is not that of"):
        read_generations([first, swapped])
    reference = write(tmp_path / "3.jsonl", ROW, {**other, "reference": "y"})
    with pytest.raises(DataError, match=r"3\.jsonl, line 2: its reference"):
        read_generations([first, reference])
    doubled = write(tmp_path / "4.jsonl", ROW, ROW)
    with pytest.raises(DataError, match=r"line 2.*repeats line 1"):
        read_generations([first, doubled])


def test_other_row_counts_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", ROW, ROW)
    short = write(tmp_path / "2.jsonl", ROW)
    for files in ([first, short], [short, first]):
        with pytest.raises(DataError, match="line 2: expected"):
            read_generations(files)


def test_files_that_are_missing_empty_cut_or_doubled_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_generations([tmp_path / "none.jsonl"])
    with pytest.raises(DataError, match="cannot be read"):
        read_generations([tmp_path])
    with pytest.raises(DataError, match="empty file"):
        read_generations([write(tmp_path / "empty.jsonl")])
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(ROW).encode() * 50)[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        read_generations([cut])
    once = write(tmp_path / "once.jsonl", ROW)
    with pytest.raises(DataError, match="given twice"):
        read_generations([once, tmp_path / "." / "once.jsonl"])


def test_writing_to_an_impossible_place_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(DataError, match="cannot be written"):
        write_generations(tmp_path / "file" / "below.jsonl", ["s"], ["r"], ["g"])
    assert (tmp_path / "file").read_text() == "kept"
