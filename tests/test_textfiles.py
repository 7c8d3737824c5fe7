"""A byte-order mark is read past wherever the project opens a text file of a user's."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dlmone_fast.bulk.shards import plan_shards, read_shard
from dlmone_fast.config import load_toml
from dlmone_fast.data.rows import read_rows
from dlmone_fast.errors import ConfigError, DataError, ModelFileError
from dlmone_fast.evaluation.generations import read_generations
from dlmone_fast.models.plainfiles import read_json
from dlmone_fast.sources import calibration_prompts, is_jsonl, numbered_lines, source_of
from dlmone_fast.textfiles import BOM, decoded, lines_of
from dlmone_fast.tokenizer import SPECIAL_TOKENS, Tokenizer

ROWS = b'{"src": "one", "trg": "two"}\n{"src": "three", "trg": "four"}\n'


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_lines_lose_the_mark_and_nothing_else() -> None:
    def lines(content: bytes, limit: int = 10, **options: bool) -> list[bytes]:
        return list(lines_of(io.BytesIO(content), limit, **options))

    assert lines(BOM + b"one\r\ntwo") == lines(b"one\r\ntwo") == [b"one\r\n", b"two"]
    assert lines(BOM) == lines(b"") == []
    assert lines(BOM + b"\n") == [b"\n"]
    # Only where a file begins.
    assert lines(b"one\n" + BOM + b"two") == [b"one\n", BOM + b"two"]
    assert lines(BOM + b"one", from_start=False) == [BOM + b"one"]
    # The mark takes nothing of the line's room: as many bytes as without it.
    for length in range(8, 13):
        text = b"x" * length + b"\nlast\n"
        assert lines(BOM + text) == lines(text)
    assert decoded(BOM + "é".encode()) == decoded("é".encode()) == "é"


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_rows(tmp_path: Path, name: str) -> None:
    rows = list(read_rows(written(tmp_path / name, BOM + ROWS)))
    assert [(row.src, row.line) for row in rows] == [("one", 1), ("three", 2)]
    with pytest.raises(DataError, match="empty; a split needs at least one row"):
        list(read_rows(written(tmp_path / name, BOM)))


@pytest.mark.parametrize("name", ["seed0.jsonl", "seed0.jsonl.gz"])
def test_generation_files(tmp_path: Path, name: str) -> None:
    line = json.dumps({"source": "a", "reference": "b", "recover": "c"}).encode()
    assert read_generations([written(tmp_path / name, BOM + line)]).sources == ["a"]


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
@pytest.mark.parametrize("rows", [1, 10])
def test_bulk_inputs(tmp_path: Path, name: str, rows: int) -> None:
    shards = plan_shards(written(tmp_path / name, BOM + ROWS), rows)
    read = [row for shard in shards for row in read_shard(shard, "src", "")]
    assert [row.source for row in read] == ["one", "three"]
    assert not any(row.reason for row in read)


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt", "in.jsonl.gz", "in.txt.gz", "in"])
def test_sources_and_calibration_prompts(tmp_path: Path, name: str) -> None:
    content = b"one\nthree\n" if ".txt" in name else ROWS
    path = str(written(tmp_path / name, BOM + content))
    jsonl, lines = is_jsonl(path, "auto", numbered_lines(path))
    assert [source_of(path, *line, jsonl).text for line in lines] == ["one", "three"]
    assert calibration_prompts(path, "int8") == ["one", "three"]


def test_standard_input() -> None:
    code = (
        "from dlmone_fast.sources import is_jsonl, numbered_lines, source_of\n"
        "jsonl, lines = is_jsonl(None, 'auto', numbered_lines(None))\n"
        "print([source_of(None, *line, jsonl).text for line in lines])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=BOM + ROWS, capture_output=True, timeout=60, check=True
    )
    assert done.stdout == b"['one', 'three']\n"


def test_vocabularies_and_tokenizers(tmp_path: Path) -> None:
    tokens = [*SPECIAL_TOKENS, "one"]
    vocab = written(tmp_path / "vocab.txt", BOM + "\n".join(tokens).encode())
    tokenizer = Tokenizer.from_vocab_file(vocab)
    assert tokenizer.vocabulary == tuple(tokens)
    saved = written(tmp_path / "tokenizer.json", BOM + tokenizer.to_json().encode())
    assert Tokenizer.from_file(saved).hash == tokenizer.hash


def test_configurations_and_json(tmp_path: Path) -> None:
    assert load_toml(written(tmp_path / "mine.toml", BOM + b"seed = 3\n")) == {"seed": 3}
    written(tmp_path / "training_args.json", BOM + b'{"seq_len": 8}')
    assert read_json(tmp_path, "training_args.json", ModelFileError) == {"seq_len": 8}


def test_the_place_of_a_bad_byte_is_the_same_with_the_mark(tmp_path: Path) -> None:
    content = b"[teacher]\nsteps = 3\n\xff\n"
    for start in (b"", BOM):
        with pytest.raises(ConfigError, match="line 3"):
            load_toml(written(tmp_path / "mine.toml", start + content))
