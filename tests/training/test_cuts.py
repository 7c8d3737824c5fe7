"""Texts that lose tokens: counted for each split, and said wherever a run speaks of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dlmone_fast import train
from dlmone_fast.comparison import compare, measure
from dlmone_fast.config import Config, resolve
from dlmone_fast.data.batches import batch
from dlmone_fast.data.cache import open_or_build
from dlmone_fast.data.cuts import Lengths, cuts_of, percent
from dlmone_fast.errors import DataError
from dlmone_fast.tokenizer import Tokenizer
from dlmone_fast.training import run

Make = Callable[..., Config]
SHORT, LONG = "ba ce", " ".join(["ba ce da"] * 7)
# Of 21 and 2 words: 23 and 4 tokens.
ROWS = {"train": [LONG, SHORT, LONG, SHORT], "valid": [SHORT, LONG], "test": [SHORT, SHORT, LONG]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, sources in ROWS.items():
        lines = (json.dumps({"src": source, "trg": SHORT}) + "\n" for source in sources)
        (tmp_path / f"{split}.jsonl").write_text("".join(lines) * 20)
    return tmp_path


def lengths(split: str, src: list[int], trg: list[int]) -> Lengths:
    return Lengths(split, np.array(src), np.array(trg))


def test_the_cuts_are_those_of_the_layout(data: Path) -> None:
    tokenizer = Tokenizer.from_words(["ba", "ce", "da"])
    cache = open_or_build(data / "train.jsonl", tokenizer, data / "cache")
    for source_positions in (0, 8, 16, 24):
        config = resolve(
            "qqp-small", model={"seq_len": 26, "source_positions": source_positions,
                                "max_positions": 64}
        )  # fmt: skip
        of_pairs = cuts_of(
            Lengths("train", np.diff(cache.src_offsets), np.diff(cache.trg_offsets)), config
        )
        ids, _ = batch(cache, range(80), 26, tokenizer, source_positions)
        kept = (ids >= 5).sum(1).numpy()
        whole = np.diff(cache.src_offsets) + np.diff(cache.trg_offsets) - 4
        lost = sum(cut.cut for cut in of_pairs)
        assert lost == int((kept < whole).sum()) or source_positions == 24
        if source_positions == 24:
            assert [cut.cut for cut in of_pairs] == [0, 80]


def test_a_cut_is_said_with_the_limit_that_would_spare_nearly_all() -> None:
    config = resolve("qqp-small", model={"seq_len": 128, "source_positions": 32})
    src = [20] * 43 + [50] * 56 + [90]
    (sources, targets) = cuts_of(lengths("train", src, [10] * 100), config)
    assert sources.sentence() == (
        "train: 57 % of sources are cut at 32 tokens (57 of 100); "
        "model.source_positions = 56 would cut 1 %"
    )
    assert targets.sentence() == "train: no target is cut at 96 tokens"
    (_, generated) = cuts_of(lengths("valid", src, [10] * 100), config)
    assert (generated.texts, generated.cut, generated.limit) == ("sources", 57, 31)
    (tested,) = cuts_of(lengths("test", src, [500] * 100), resolve("qqp"))
    assert (
        tested.sentence() == "test: 1 % of sources are cut at 64 tokens (1 of 100); "
        "data.max_source_tokens = 96 would cut 0 %"
    )
    (pairs,) = cuts_of(lengths("train", [100] * 100, [100] * 100), resolve("qqp"))
    assert pairs.sentence().endswith("(100 of 100); model.seq_len = 208 would cut 0 %")


def test_a_proposed_limit_cuts_what_is_promised() -> None:
    src = [4] * 50 + [60] * 50
    for model in ({"source_positions": 16}, {"source_positions": 0, "seq_len": 40}):
        config = resolve("qqp-small", model=model)
        for split in ("train", "valid"):
            for cut in cuts_of(lengths(split, src, [20] * 100), config):
                if not cut.cut:
                    continue
                settings = cut.remedy.removesuffix(" would cut 0 %").split(" with ")
                changed: dict[str, dict[str, int]] = {"model": dict(model), "data": {}}
                for setting in settings:
                    name, value = setting.split(" = ")
                    section, key = name.split(".")
                    changed[section][key] = int(value)
                sizes = changed["model"]
                sizes.setdefault("seq_len", config.model.seq_len)
                better = resolve("qqp-small", **changed)
                again = cuts_of(lengths(split, src, [20] * 100), better)
                assert [c.cut for c in again if c.texts == cut.texts] == [0]


def test_a_share_is_never_rounded_to_none() -> None:
    assert [percent(x) for x in (0.0, 1e-6, 0.0042, 0.5, 1.0)] == [
        "0 %", "0.001 %", "0.42 %", "50 %", "100 %",
    ]  # fmt: skip


def test_the_plan_counts_cuts_and_writes_nothing(
    data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    command = ["--preset", "qqp-small", "--dry-run", "--data.vocab-size", "64"]
    sizes = ["--model.seq-len", "24", "--data-dir", str(data)]
    train.main([*command, *sizes])
    printed = capsys.readouterr().out
    assert "train: 50 % of sources are cut at 12 tokens (40 of 80)" in printed
    assert "valid: 50 % of sources are cut at 11 tokens (20 of 40)" in printed
    assert "test: 33 % of sources are cut at 11 tokens (20 of 60)" in printed
    train.main([*command, *sizes[:1], "64", *sizes[2:]])
    assert "no source is cut" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    (data / "test.jsonl").write_text("[]\n")
    with pytest.raises(DataError, match=r"test\.jsonl, line 1"):
        train.main([*command, *sizes])
    train.main(command)
    assert "are counted where --data-dir names the data" in capsys.readouterr().out


def test_a_run_says_its_cuts_in_its_log_its_records_and_its_table(
    data: Path,
    tiny: Make,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is measured does not matter here.
    monkeypatch.setattr(measure, "_LATENCY_SECONDS", 0.01)
    monkeypatch.setattr(compare, "_SEARCH_STEPS", (1,))
    config = tiny(
        tmp_path / "run", data_dir=str(data), data={"task": "custom", "vocab_size": 64},
        model={"seq_len": 24, "source_positions": 12}, teacher={"steps": 2},
        evaluation={"rows": 2, "teacher_steps": "", "student_steps": "1", "bootstrap": 0},
    )  # fmt: skip
    result = run(config)
    said = capfd.readouterr().err
    assert "train: 50 % of sources are cut at 12 tokens (40 of 80)" in said
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (record,) = [r for r in map(json.loads, lines) if "cuts" in r and r["phase"] == "teacher"]
    counted = {(cut["split"], cut["texts"]): cut["cut"] for cut in record["cuts"]}
    assert counted == {
        ("train", "sources"): 40, ("train", "targets"): 0, ("valid", "targets"): 0,
        ("valid", "sources"): 20, ("test", "sources"): 20,
    }  # fmt: skip
    table = compare.compare_run(result)
    assert "test: 33 % of sources are cut at 11 tokens (20 of 60)" in table
    content = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert content["cuts"] == record["cuts"]
