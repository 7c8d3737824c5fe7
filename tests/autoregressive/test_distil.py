from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_autoregressive import LETTERS, SIZES, words

from dlmone_fast.autoregressive import distil
from dlmone_fast.autoregressive.distil_config import DistillationConfig
from dlmone_fast.autoregressive.distillation import _fault, majority
from dlmone_fast.autoregressive.folder import save_model
from dlmone_fast.autoregressive.generation import Autoregressive, load_autoregressive
from dlmone_fast.autoregressive.model import EncoderDecoder
from dlmone_fast.autoregressive.vocabulary import Symbols, WordPiece
from dlmone_fast.data.rows import load_rows
from dlmone_fast.errors import ConfigError, DataError, InterruptedAndSavedError
from dlmone_fast.models.manifest import verify_manifest
from dlmone_fast.tokenizer import Tokenizer

VOCABULARY = Symbols(LETTERS, [letter * 2 for letter in LETTERS])
Make = Callable[..., DistillationConfig]


def model_folder(path: Path, vocabulary: Any = VOCABULARY, seed: int = 0) -> Path:
    sizes = dataclasses.replace(
        SIZES, source_vocab=vocabulary.source_size, target_vocab=vocabulary.target_size,
        shared_vocab=vocabulary.shared,
    )  # fmt: skip
    model = EncoderDecoder(sizes, seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2 if p.dim() > 1 else 1)
        # Texts end, so that few are cut.
        model.bias[vocabulary.end_id] += 2
    return save_model(path, sizes, dict(model.named_parameters()), vocabulary, {})


@pytest.fixture
def make(data_dir: Path, tmp_path: Path) -> Make:
    folder = model_folder(tmp_path / "model")

    def settings(**changes: Any) -> DistillationConfig:
        base = DistillationConfig(
            data_dir=str(data_dir), output_dir=str(tmp_path / "new"), model=(str(folder),),
            samples=2, part_size=64, precision="fp32", temperature=1.0,
        )  # fmt: skip
        return dataclasses.replace(base, **changes)

    return settings


def made_from(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "made_from.json").read_text(encoding="utf-8"))
    return content


def silent(line: str) -> None:
    pass


def test_a_folder_of_samples_says_what_it_was_made_from(make: Make, data_dir: Path):
    folder = distil(make(), silent)
    rows = load_rows(folder, "train")
    made = made_from(folder)
    assert len(rows) == made["rows"] > 100
    assert made["texts"] == 2 * made["sources"]
    assert (
        made["rows"] + sum(n for name, n in made["left_out"].items() if "texts" in name)
        == (made["texts"])
    )
    assert {row.src for row in rows} <= set(words(200))
    for split in ("valid", "test"):
        copied = folder / f"{split}.jsonl"
        assert copied.read_bytes() == (data_dir / f"{split}.jsonl").read_bytes()
    assert "made_from.json" in verify_manifest(folder)
    assert not folder.with_name("new.parts").exists()


def test_a_stopped_distillation_continues_to_the_same_folder(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = distil(make(output_dir=str(tmp_path / "whole")), silent)
    generate = Autoregressive.generate_candidates
    calls = []

    def counting(self: Autoregressive, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(Autoregressive, "generate_candidates", counting)
    with pytest.raises(InterruptedAndSavedError, match="after 2 of 4 parts"):
        distil(make(), silent)
    folder = distil(make(), silent)
    assert len(calls) == 4
    assert (folder / "train.jsonl").read_bytes() == (whole / "train.jsonl").read_bytes()
    distil(make(), silent)
    assert len(calls) == 4


def test_another_model_or_setting_is_refused(make: Make, tmp_path: Path):
    distil(make(), silent)
    model_folder(tmp_path / "model", seed=1)
    with pytest.raises(ConfigError, match="made from other models"):
        distil(make(), silent)
    model_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match="other settings"):
        distil(make(seed=1), silent)


def test_further_sources_are_added_and_test_sources_kept_out(make: Make, tmp_path: Path):
    test = words(20, 400)
    (tmp_path / "more.txt").write_text(
        "\n".join(["hhhaa", test[0].upper(), "", "x9", "ab" * 12]) + "\n", encoding="utf-8"
    )
    (tmp_path / "secret.txt").write_text(f"{words(1)[0]}\n", encoding="utf-8")
    folder = distil(make(sources=str(tmp_path / "more.txt")), silent)
    made = made_from(folder)
    # The one in capitals, and words that both splits happen to have.
    shared = set(words(200)) & set(test)
    assert made["excluded_sources"] == {"count": 1 + len(shared), "by": ["test"]}
    assert not {row.src.lower() for row in load_rows(folder, "train")} & set(test)
    assert made["blank_lines"] == 1
    assert made["left_out"]["sources: unknown symbols"] == 1
    assert made["left_out"]["sources: too long"] == 1
    second = make(
        output_dir=str(tmp_path / "second"), exclude=("test", str(tmp_path / "secret.txt"))
    )
    rows = load_rows(distil(second, silent), "train")
    assert words(1)[0] not in {row.src for row in rows}
    with pytest.raises(DataError, match="no such file"):
        distil(make(exclude=("tst",)), silent)


def test_several_models_vote(make: Make, tmp_path: Path):
    folders = [model_folder(tmp_path / f"m{seed}", seed=seed) for seed in (0, 1, 2)]
    config = make(model=tuple(map(str, folders)), samples=1)
    folder = distil(config, silent)
    made = made_from(folder)
    assert sum(made["votes"].values()) == made["sources"]
    models = [load_autoregressive(folder, "fp32") for folder in folders]
    for row in load_rows(folder, "train", limit=20):
        texts = [str(model.generate(row.src)) for model in models]
        assert row.trg in texts
        assert texts.count(row.trg) == max(map(texts.count, texts))


def test_majority_breaks_ties_by_the_summed_score():
    assert majority([("a", -9.0), ("b", -1.0), ("a", -9.0)]) == ("a", 2)
    assert majority([("a", -3.0), ("b", -1.0)]) == ("b", 1)
    assert majority([("a", -1.0), ("b", -1.5), ("a", -3.0), ("b", -1.0)]) == ("b", 2)


def test_copies_stammer_and_empty_texts_are_left_out():
    assert _fault("what is it?", True, "why is it?", True) == ""
    assert "copy" in _fault("why is it?", True, "why is it?", True)
    assert "twice" in _fault("why why is it?", True, "how is it?", True)
    assert _fault("n n", True, "", False) == ""
    assert _fault("", True, "why", True) == "empty"
    assert "cut" in _fault("why", False, "how", True)
    assert "[UNK]" in _fault("why [UNK]", True, "how", True)


def test_text_models_write_both_directions(text_dir: Path, make: Make, tmp_path: Path):
    texts = [text for row in load_rows(text_dir, "train") for text in (row.src, row.trg)]
    vocabulary = WordPiece(Tokenizer.learn(texts, 120))
    sizes = dataclasses.replace(SIZES, source_positions=40)
    sizes = dataclasses.replace(
        sizes, source_vocab=vocabulary.source_size, target_vocab=vocabulary.target_size,
        shared_vocab=True,
    )  # fmt: skip
    model = EncoderDecoder(sizes)
    with torch.no_grad():
        model.bias[vocabulary.end_id] += 3
    folder = save_model(
        tmp_path / "text-model", sizes, dict(model.named_parameters()), vocabulary, {}
    )
    config = make(data_dir=str(text_dir), model=(str(folder),), both_directions=True, samples=4)
    made = made_from(distil(config, silent))
    assert made["excluded_sources"]["count"] > 0
    assert made["texts"] == 4 * made["sources"]


def test_settings_that_exclude_each_other_are_named(make: Make):
    with pytest.raises(ConfigError, match="samples must be 1"):
        make(temperature=0.0)
    with pytest.raises(ConfigError, match="twice"):
        make(model=("a", "a"), samples=1)
    with pytest.raises(ConfigError, match="--model is missing"):
        make(model=())
