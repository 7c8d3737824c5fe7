"""Teachers that start from a pretrained BERT-family encoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import torch
from safetensors.torch import load_file, save_file
from tiny_training import tiny_config

import dlmone_fast
from dlmone_fast.config import Config
from dlmone_fast.errors import ConfigError, ModelFileError
from dlmone_fast.models.folder import load_folder
from dlmone_fast.models.pretrained import prune_vocabulary, read_pretrained
from dlmone_fast.networks import DiffusionLM
from dlmone_fast.networks.embedding import time_features
from dlmone_fast.tokenizer import Tokenizer
from dlmone_fast.training import run
from dlmone_fast.training.start import principal_components, start_from, with_start

TEXTS = ["how does the cat work ?", "what makes the old dog go ?", "the tree and the river"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return tiny_bert.write_bert(tmp_path / "bert")


def config_of(tmp_path: Path, bert: Path, **model: Any) -> Config:
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    lines = [json.dumps({"src": a, "trg": b}) for a in TEXTS for b in TEXTS]
    for split in ("train", "valid", "test"):
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    sizes = {"source": "masked", "seq_len": 24, "source_positions": 12, "embedding_dim": 14}
    return tiny_config(
        tmp_path / "run",
        data_dir=str(data),
        model={"start_from": str(bert), **sizes, **model},
        data={"task": "custom", "prune_below": 1},
    )


def started(tmp_path: Path, bert: Path) -> tuple[DiffusionLM, Tokenizer]:
    start = read_pretrained(bert)
    tokenizer = prune_vocabulary(start.tokenizer, TEXTS, 1)
    model = with_start(config_of(tmp_path, bert), start).model
    lm = DiffusionLM(replace(model, vocab_size=tokenizer.vocab_size)).eval()
    start_from(lm, start, tokenizer)
    return lm, tokenizer


@torch.no_grad()
def test_a_clean_latent_gives_the_pretrained_embedding_back(tmp_path: Path, bert: Path) -> None:
    lm, tokenizer = started(tmp_path, bert)
    words = read_pretrained(bert).rows_of(tokenizer)
    back = lm.backbone.input_projection(lm.tokens.table())
    table = torch.cat([lm.tokens.table(), torch.ones(len(words), 1)], 1)
    best = table @ torch.linalg.lstsq(table, words).solution
    # As near as any linear map comes, but for the tanh.
    assert (back - words).norm() < 1.05 * (best - words).norm() + 0.02 * words.norm()
    norms = lm.tokens.table().norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 14**0.5))


@torch.no_grad()
def test_the_trunk_is_bert(tmp_path: Path, bert: Path) -> None:
    lm, _ = started(tmp_path, bert)
    weights = tiny_bert.tensors()
    x = torch.randn(1, 24, 14)
    time = lm.backbone.time_mlp(time_features(torch.tensor([3.0]), lm.config.time_dim))
    assert not time.any()
    h = lm.backbone.input_projection(x)[0]
    positions = weights["bert.embeddings.position_embeddings.weight"]
    types = weights["bert.embeddings.token_type_embeddings.weight"]
    h[:12] += positions[:12] + types[1]
    h[12:] += positions[:12] + types[0]
    h = (h - h.mean(-1, keepdim=True)) / h.var(-1, correction=0, keepdim=True).sqrt()
    norm = "bert.embeddings.LayerNorm"
    h = h * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
    for index in range(2):
        h = tiny_bert.bert_layer(h, weights, index)
    features, _ = lm.backbone.features(x, torch.tensor([3.0]))
    torch.testing.assert_close(features[0], h[:12], atol=2e-5, rtol=1e-4)


def test_components_have_one_norm_and_order() -> None:
    numbers = torch.Generator().manual_seed(1)
    words = torch.randn(40, 8, generator=numbers) * torch.arange(8, 0, -1) + 3
    rows = principal_components(words, 4)
    torch.testing.assert_close(rows.norm(dim=-1), torch.full((40,), 2.0))
    assert rows[5:, 0].std() > rows[5:, 3].std()


def test_a_run_starts_there_and_its_folder_names_no_other(tmp_path: Path, bert: Path) -> None:
    result = run(config_of(tmp_path, bert))
    assert result.student is not None
    folder = load_folder(result.teacher or "")
    assert folder.config["model"]["start_from"] == ""
    assert folder.config["model"]["hidden_size"] == 16
    assert folder.config["source"]["inputs"]["start"] == read_pretrained(bert).sha256
    model = dlmone_fast.load(result.student, backend="eager")
    # Words that the pruned vocabulary lacks are spelled.
    assert "[UNK]" not in model.tokenizer.decode_clean(model.tokenizer.encode(["xylem"])[0])
    # The start may move, and may not change.
    moved = bert.rename(tmp_path / "moved")
    again = config_of(tmp_path, moved)
    assert run(again, "teacher").teacher == result.teacher
    tensors = load_file(moved / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, moved / "model.safetensors")
    with pytest.raises(ConfigError, match="was made from another start"):
        run(again, "teacher")


def test_starts_that_do_not_fit_are_refused(tmp_path: Path, bert: Path) -> None:
    start = read_pretrained(bert)
    long = config_of(tmp_path, bert, seq_len=120, source_positions=60, max_positions=120)
    with pytest.raises(ConfigError, match="it has 48 positions"):
        with_start(long, start)
    with pytest.raises(ConfigError, match="its width is 16"):
        with_start(config_of(tmp_path, bert, embedding_dim=18), start)
    config = config_of(tmp_path, bert)
    with pytest.raises(ConfigError, match=r"brings its own vocabulary, and data\.vocab_file"):
        replace(config, data=replace(config.data, vocab_file="vocab.txt"))
    (bert / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"model\.safetensors"):
        run(config, "teacher")
    assert not (tmp_path / "run" / "config.toml").exists()
