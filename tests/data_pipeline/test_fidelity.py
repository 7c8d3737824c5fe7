"""A tokenizer's losses on a user's rows: letters are kept by default, and every loss is counted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dlmone_fast.config import from_dict, resolve
from dlmone_fast.data.cache import open_or_build
from dlmone_fast.data.fidelity import Fidelity, split_fidelity
from dlmone_fast.errors import ConfigError
from dlmone_fast.tokenizer import SPECIAL_TOKENS, Tokenizer
from dlmone_fast.train import main
from dlmone_fast.training.workspace import make_tokenizer

TEXTS = [
    "मैं आज स्कूल जा रहा हूँ",
    "がぎぐげご ぱぴぷ",
    "мой йод",
    "la forêt où l'été",
    "ผมไปโรงเรียนวันนี้",
    "আমি স্কুলে যাই",
]


def counted(tokenizer: Tokenizer, texts: list[str]) -> Fidelity:
    fidelity = Fidelity()
    fidelity.add(tokenizer, texts, tokenizer.encode(texts))
    return fidelity


def folder_of(directory: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"src": text, "trg": text}) for text in texts]
    for split in ("train", "valid", "test"):
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


@pytest.mark.parametrize("text", TEXTS)
def test_a_learned_vocabulary_gives_its_texts_back(text: str) -> None:
    tokenizer = Tokenizer.learn([text], 600)
    (ids,) = tokenizer.encode([text])
    # Up to the clean-up of spaces, which is DiffuSeq's.
    assert tokenizer.decode_clean(ids).replace(" ", "") == text.lower().replace(" ", "")
    assert counted(tokenizer, [text]).lost == 0
    again = Tokenizer.from_json(tokenizer.to_json())
    assert (again.hash, again.strip_accents) == (tokenizer.hash, False)


def test_stripping_is_asked_for_or_is_bert_s_own(tmp_path: Path) -> None:
    stripping = Tokenizer.learn(TEXTS, 600, strip_accents=True)
    assert stripping.decode_clean(stripping.encode(["forêt"])[0]) == "foret"
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL_TOKENS, "foret", "forêt"]) + "\n", encoding="utf-8")
    for lowercase, strip, written in (
        (True, None, "foret"),
        (True, False, "forêt"),
        (False, None, "forêt"),
        (False, True, "foret"),
    ):
        tokenizer = Tokenizer.from_vocab_file(path, lowercase, strip)
        assert tokenizer.decode_clean(tokenizer.encode(["forêt"])[0]) == written
    # Files of earlier versions say nothing, and keep what it meant.
    old = json.loads(Tokenizer.from_vocab_file(path).to_json())
    assert old["normalizer"]["strip_accents"] is None
    del old["normalizer"]["strip_accents"]
    kept = Tokenizer.from_json(json.dumps(old))
    assert kept.decode_clean(kept.encode(["forêt"])[0]) == "foret"


def test_the_configuration_decides(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "été", "ete"]) + "\n", "utf-8")
    folder = folder_of(tmp_path, ["Été"])

    def written(**data: object) -> str:
        config = resolve("qqp-small", data={"task": "custom", "vocab_file": "", **data})
        tokenizer = make_tokenizer(config, folder)
        return tokenizer.decode_clean(tokenizer.encode(["Été"])[0])

    assert written() == written(strip_accents="off") == "été"
    assert written(strip_accents="on") == "ete"
    assert written(vocab_file="vocab.txt") == "ete"
    assert written(vocab_file="vocab.txt", strip_accents="off") == "été"
    with pytest.raises(ConfigError, match=r'data\.strip_accents must be "auto", "on" or "off"'):
        from_dict({"data": {"strip_accents": True}})


def test_a_cased_vocabulary_is_not_lower_cased_without_a_word(tmp_path: Path) -> None:
    tokens = [*SPECIAL_TOKENS, "The", "the", "Cat", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", "utf-8")
    data = {"task": "custom", "vocab_file": "vocab.txt"}
    with pytest.raises(ConfigError, match=r"cased vocabulary.*data\.lowercase = false"):
        make_tokenizer(resolve("qqp-small", data=data), tmp_path)
    tokenizer = make_tokenizer(resolve("qqp-small", data={**data, "lowercase": False}), tmp_path)
    assert tokenizer.decode_clean(tokenizer.encode(["The Cat"])[0]) == "The Cat"


def test_losses_are_counted() -> None:
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "la", "foret", "##s", "."])
    fidelity = counted(tokenizer, ["La  forêt.", "la xyz", "la forets"])
    assert (fidelity.letters, fidelity.tokens) == (8 + 5 + 8, 3 + 2 + 3)
    # ê, and the word that is not known.
    assert (fidelity.lost, fidelity.unknown) == (1 + 3, 1)
    line = fidelity.line("train.jsonl")
    assert "loses 4 of 21 letters (19.05 %)" in line
    assert "1 of 8 tokens as [UNK] (12.50 %)" in line
    assert "a larger data.vocab_size" in line
    assert "strip_accents = off" in counted(tokenizer, ["la forêt"]).line("x")
    assert counted(tokenizer, ["la foret"]).line("x").endswith("of 2 tokens as [UNK] (0.00 %)")
    assert "under 0.01 %" in Fidelity(letters=10**6, lost=1, tokens=9).line("x")


def test_capitals_are_no_loss() -> None:
    tokenizer = Tokenizer.learn(["ΟΔΟΣ İstanbul ẞ ǅ"], 100)
    assert counted(tokenizer, ["ΟΔΟΣ İstanbul ẞ ǅ"]).lost == 0
    cased = Tokenizer.learn(["Road ΟΔΟΣ"], 100, lowercase=False)
    assert counted(cased, ["Road ΟΔΟΣ"]).lost == 0


def test_training_s_log_tells_it_where_a_cache_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder_of(tmp_path, ["la forêt"] * 3) / "train.jsonl"
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "la", "foret"])
    open_or_build(path, tokenizer, tmp_path / "cache")
    told = capsys.readouterr().err
    assert told == split_fidelity(tmp_path, "train", tokenizer).line("train.jsonl") + "\n"
    assert "loses 6 of 42 letters" in told
    open_or_build(path, tokenizer, tmp_path / "cache")
    assert capsys.readouterr().err == ""


def test_the_dry_run_tells_it_for_every_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path, ["la forêt bleue"] * 3)
    arguments = ["--preset", "qqp-small", "--data.task", "custom", "--data-dir", str(folder)]
    main([*arguments, "--data.vocab-file", "", "--data.strip-accents", "on", "--dry-run"])
    told = capsys.readouterr().out
    for split in ("train", "valid", "test"):
        assert f"{split}: the tokenizer loses 6 of 72 letters" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{split}.jsonl" for split in ("test", "train", "valid")
    ]


@pytest.mark.parametrize("size", [4000, 8000, 30_000])
def test_an_alphabet_of_ideographs_fits_where_there_is_room(size: int) -> None:
    draw = random.Random(0)
    ideographs = [chr(0x4E00 + number) for number in range(3600)]
    texts = ["".join(ideographs), *("".join(draw.choices(ideographs, k=20)) for _ in range(500))]
    tokenizer = Tokenizer.learn(texts, size)
    assert tokenizer.vocab_size == len(SPECIAL_TOKENS) + 3600
    assert counted(tokenizer, texts).unknown == 0


def test_rare_characters_do_not_displace_frequent_merges() -> None:
    words = [f"{a}{b}{c}" for a in "bcdfghkl" for b in "aeiou" for c in "mnprst"]
    draw = random.Random(1)
    common = [" ".join(draw.choices(words, k=8)) for _ in range(2000)]
    rare = "".join(chr(0x4E00 + number) for number in range(2000))
    alone = Tokenizer.learn(common, 300)
    # 98 ideographs belong to the alphabet by its third; one of two thousand displaces no merge.
    both = Tokenizer.learn([*common, rare], 300)
    assert both.vocab_size == 300
    assert set(alone.vocabulary) - set(both.vocabulary)
    assert sum(len(token) > 1 for token in both.vocabulary) > 100
