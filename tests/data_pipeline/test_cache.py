"""The token cache: what it holds, when it is built again, and what an interruption leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import words

from dlmone_fast.aligned_tokenizer import AlignedTokenizer
from dlmone_fast.data import cache as cache_module
from dlmone_fast.data.cache import TokenCache, open_or_build
from dlmone_fast.errors import DataError
from dlmone_fast.tokenizer import Tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.from_words(WORDS)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache_module, "CHUNK_ROWS", 4)
    path = tmp_path / "train.jsonl"
    _write(path, 11)
    return path


def _write(path: Path, rows: int) -> None:
    lines = [
        json.dumps({"src": " ".join(WORDS[: 1 + i % 5]), "trg": " ".join(WORDS[i % 3 :])})
        for i in range(rows)
    ]
    path.write_text("\n".join(lines))


def _pairs(cache: TokenCache) -> list[tuple[list[int], list[int]]]:
    return [cache.pair(row) for row in range(len(cache))]


def test_the_cache_holds_what_the_tokenizer_gives(data: Path, tokenizer: Tokenizer) -> None:
    cache = open_or_build(data, tokenizer, data.parent / "cache")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    src, trg = (tokenizer.encode([row[key] for row in rows]) for key in ("src", "trg"))
    assert _pairs(cache) == list(zip(src, trg, strict=True))
    assert isinstance(cache.src_ids, np.memmap)
    assert (cache.src_ids.dtype, cache.src_offsets.dtype) == (np.int32, np.int64)


def test_it_is_tokenised_once(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _pairs(open_or_build(data, tokenizer, data.parent / "cache"))
    monkeypatch.setattr(Tokenizer, "encode", None)
    assert _pairs(open_or_build(data, tokenizer, data.parent / "cache")) == first


def test_other_data_or_another_vocabulary_get_another_folder(
    data: Path, tokenizer: Tokenizer
) -> None:
    where = data.parent / "cache"
    folders = {open_or_build(data, tokenizer, where).folder}
    folders.add(open_or_build(data, Tokenizer.from_words(WORDS[::-1]), where).folder)
    _write(data, 12)
    folders.add(open_or_build(data, tokenizer, where).folder)
    assert len(folders) == 3
    assert set(where.iterdir()) == folders


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_nothing(
    data: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    encode, calls = Tokenizer.encode, 0

    def interrupted(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode", interrupted)
    with pytest.raises(error):
        open_or_build(data, tokenizer, data.parent / "cache")
    assert list((data.parent / "cache").iterdir()) == []
    assert len(open_or_build(data, tokenizer, data.parent / "cache")) == 11


def test_the_remains_of_a_killed_build_are_not_read(data: Path, tokenizer: Tokenizer) -> None:
    where = data.parent / "cache"
    cache = open_or_build(data, tokenizer, where)
    expected = _pairs(cache)
    remains = where / f".building-{cache.folder.name}-abc"
    shutil.move(cache.folder, remains)
    (remains / "src_ids.npy").write_bytes(b"torn")
    assert _pairs(open_or_build(data, tokenizer, where)) == expected


@pytest.mark.parametrize("name", ["src_ids", "src_offsets", "trg_ids", "trg_offsets"])
@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "header", "flip"])
def test_a_damaged_cache_is_built_again(
    data: Path, tokenizer: Tokenizer, name: str, damage: str
) -> None:
    cache = open_or_build(data, tokenizer, data.parent / "cache")
    expected, folder = _pairs(cache), cache.folder
    path = folder / f"{name}.npy"
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        flipped = content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]
        damaged = {"cut": content[:-4], "longer": content + b"1234", "flip": flipped}
        path.write_bytes(damaged.get(damage, bytes(128) + content[128:]))
    rebuilt = open_or_build(data, tokenizer, data.parent / "cache")
    assert rebuilt.folder == folder
    assert _pairs(rebuilt) == expected
    assert path.read_bytes() == content


@pytest.mark.parametrize("meta", ["", "[]", "{}", '{"identity": {}, "bytes": {}, "rows": 1}'])
def test_a_cache_with_a_wrong_description_is_built_again(
    data: Path, tokenizer: Tokenizer, meta: str
) -> None:
    folder = open_or_build(data, tokenizer, data.parent / "cache").folder
    good = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(meta)
    assert len(open_or_build(data, tokenizer, data.parent / "cache")) == 11
    assert (folder / "meta.json").read_text() == good


def test_a_build_that_comes_second_uses_the_first(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    install, where = cache_module._install, data.parent / "cache"

    def beaten(building: Path, folder: Path, identity: dict[str, object]) -> None:
        shutil.copytree(building, folder)
        install(building, folder, identity)

    monkeypatch.setattr(cache_module, "_install", beaten)
    cache = open_or_build(data, tokenizer, where)
    assert len(cache) == 11
    assert list(where.iterdir()) == [cache.folder]


def test_rows_over_the_character_cap_name_their_line(data: Path) -> None:
    tokenizer = Tokenizer([*Tokenizer.from_words(WORDS).vocabulary], max_chars=25)
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: 33 characters, the limit is 25"):
        open_or_build(data, tokenizer, data.parent / "cache")


def test_bad_rows_and_missing_files_are_data_errors(data: Path, tokenizer: Tokenizer) -> None:
    data.write_text(data.read_text() + "\nbroken")
    with pytest.raises(DataError, match="line 12"):
        open_or_build(data, tokenizer, data.parent / "cache")
    assert list((data.parent / "cache").iterdir()) == []
    with pytest.raises(DataError, match=r"none\.jsonl"):
        open_or_build(data.parent / "none.jsonl", tokenizer, data.parent / "cache")


def test_a_folder_that_cannot_be_written_is_a_data_error(data: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="cannot write the token cache"):
        open_or_build(data, tokenizer, data / "below-a-file")


@pytest.fixture(scope="module")
def aligned() -> AlignedTokenizer:
    return AlignedTokenizer.learn(words.pairs())


def test_targets_are_encoded_with_their_words(aligned: AlignedTokenizer, tmp_path: Path) -> None:
    path = words.write_split(tmp_path / "train.jsonl", words.pairs())
    cache = open_or_build(path, aligned, tmp_path / "cache")
    assert (len(cache), cache.dropped) == (len(words.pairs()), 0)
    for row, (word, target) in enumerate(words.pairs()):
        source, labels = cache.pair(row)
        assert (aligned.decode_clean(source), aligned.decode_clean(labels)) == (word, target)
        assert len(source) == len(labels)


def test_rows_that_cannot_be_aligned_are_left_out_and_said_once(
    aligned: AlignedTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*words.pairs()[:6], ("b", "b b b"), ("q", "b"), ("b", "zz")]
    path = words.write_split(tmp_path / "train.jsonl", [rows[i] for i in (0, 6, 1, 7, 8, 2, 3, 4)])
    cache = open_or_build(path, aligned, tmp_path / "cache")
    assert (len(cache), cache.dropped) == (5, 3)
    assert [aligned.decode_clean(cache.pair(row)[0]) for row in range(5)] == [
        w for w, _ in rows[:5]
    ]
    assert json.loads((cache.folder / "meta.json").read_text())["dropped"] == 3
    (said,) = caplog.messages
    assert "3 of 8 rows (37.50%) cannot be aligned" in said
    assert "(lines 2, 4, 5)" in said
    assert open_or_build(path, aligned, tmp_path / "cache").dropped == 3
    assert len(caplog.messages) == 1


def test_a_file_without_any_row_that_can_be_aligned_is_refused(
    aligned: AlignedTokenizer, tmp_path: Path
) -> None:
    path = words.write_split(tmp_path / "train.jsonl", [("b", "b b b")])
    with pytest.raises(DataError, match=r"1 of 1 rows \(100.00%\) cannot be aligned"):
        open_or_build(path, aligned, tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())
