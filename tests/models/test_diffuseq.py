"""The import of DiffuSeq checkpoints: exact conversion, clear refusals, nothing executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlmone_fast import import_diffuseq, train
from dlmone_fast.errors import ModelFileError, UsageError
from dlmone_fast.models import diffuseq
from dlmone_fast.models.diffuseq import find_checkpoint, import_teacher, load_state_dict
from dlmone_fast.models.folder import load_folder
from dlmone_fast.tokenizer import SPECIAL_TOKENS, Tokenizer

TINY = Path(__file__).parents[1] / "data" / "diffuseq-tiny"
FILE = "ema_0.9999_050000.pt"

pytestmark = pytest.mark.filterwarnings("ignore:.*embedding matrices differ")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load_state_dict(TINY / FILE).items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A writable copy of the tiny checkpoint."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in (FILE, "training_args.json"):
        shutil.copy(TINY / name, folder)
    return folder


def change_args(source: Path, change: dict[str, Any]) -> None:
    path = source / "training_args.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_every_tensor_arrives_under_its_new_name(tmp_path: Path, state: dict[str, Tensor]) -> None:
    report = import_teacher(TINY, tmp_path / "out")
    folder = load_folder(tmp_path / "out")
    tensors = folder.tensors
    assert report.num_parameters == sum(tensor.numel() for tensor in tensors.values()) == 399_827
    assert torch.equal(tensors["tokens.bias"], state["lm_head.bias"])
    assert torch.equal(tensors["backbone.time_mlp.2.bias"], state["time_embed.2.bias"])
    assert torch.equal(tensors["backbone.input_norm.weight"], state["LayerNorm.weight"])
    assert torch.equal(tensors["backbone.position.weight"], state["position_embeddings.weight"])
    block, layer = "backbone.blocks.1", "input_transformers.layer.1"
    for ours, theirs in {
        "attention.output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
        "ffn_norm": "output.LayerNorm",
    }.items():
        assert torch.equal(tensors[f"{block}.{ours}.weight"], state[f"{layer}.{theirs}.weight"])
    rows = tensors[f"{block}.attention.qkv.weight"].split(128)
    for part, value in zip(("query", "key", "value"), rows, strict=True):
        assert torch.equal(value, state[f"{layer}.attention.self.{part}.weight"])
    # Each value of the file but position_ids and one of the two embeddings is used once.
    total = sum(t.numel() for n, t in state.items() if n != "position_ids")
    assert report.num_parameters == total - state["lm_head.weight"].numel()


def test_the_config_holds_the_sizes_of_the_tensors(tmp_path: Path) -> None:
    import_teacher(TINY, tmp_path / "out")
    config = load_folder(tmp_path / "out").config
    assert config["kind"] == "teacher"
    assert config["model"] == {
        "seq_len": 24,
        "vocab_size": 211,
        "embedding_dim": 32,
        "time_dim": 32,
        "hidden_size": 128,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_size": 256,
        "dropout": 0.1,
        "max_positions": 512,
        "norm": "post",
        "normalize_embedding": False,
        "noise_scale": 1.0,
        "source": "joined",
        "source_positions": 0,
        "source_window": 1,
        "start_from": "",
        "self_conditioning": False,
    }
    assert config["diffusion"] == {
        "schedule": "sqrt",
        "num_timesteps": 2000,
        "rescale_timesteps": True,
    }
    assert config["source"]["checkpoint"] == FILE


def test_the_card_names_a_command_that_distils_it(tmp_path: Path) -> None:
    import_teacher(TINY, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    command = re.search(r"`python -m dlmone_fast\.train (.+?)`", card)
    assert command is not None
    arguments = train._arguments(command[1].split())
    settings = arguments.settings
    assert (settings.preset, arguments.teacher_folder, settings.data_dir) == (
        "qqp",
        "folder",
        "DATA",
    )


def test_the_raw_embedding_is_the_default_and_ema_an_option(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    with pytest.warns(UserWarning, match=r"differ by up to 0\.0374.*as the official sampler"):
        raw = import_teacher(TINY, tmp_path / "raw")
    with pytest.warns(UserWarning, match="using the EMA one"):
        import_teacher(TINY, tmp_path / "ema", embedding="ema")
    tensors = {kind: load_folder(tmp_path / kind).tensors for kind in ("raw", "ema")}
    assert torch.equal(tensors["raw"]["tokens.weight"], state["lm_head.weight"])
    assert torch.equal(tensors["ema"]["tokens.weight"], state["word_embedding.weight"])
    difference = (tensors["raw"]["tokens.weight"] - tensors["ema"]["tokens.weight"]).abs().max()
    assert raw.embedding_difference == difference.item() > 0
    with pytest.raises(UsageError, match="raw or ema"):
        import_teacher(TINY, tmp_path / "x", embedding="best")


def test_equal_embeddings_bring_no_warning(source: Path, state: dict[str, Tensor]) -> None:
    tied = {**state, "word_embedding.weight": state["lm_head.weight"]}
    torch.save(tied, source / FILE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert import_teacher(source, source / "out").embedding_difference == 0


def test_parameters_in_an_ordered_dict_load_as_the_original_trainer_wrote_them(
    source: Path, state: dict[str, Tensor]
) -> None:
    from collections import OrderedDict

    torch.save(
        OrderedDict(
            (n, torch.nn.Parameter(t) if t.is_floating_point() else t) for n, t in state.items()
        ),
        source / FILE,
    )
    assert import_teacher(source, source / "out").num_parameters == 399_827


def test_heads_come_from_the_width_where_the_original_has_no_bert_config(source: Path) -> None:
    args = json.loads((source / "training_args.json").read_text())
    del args["bert_config"]
    (source / "training_args.json").write_text(json.dumps(args))
    assert import_teacher(source, source / "out").model.num_heads == 2


def test_the_highest_step_is_chosen(source: Path) -> None:
    for name in ("ema_0.9999_009000.pt", "ema_0.9999_100000.pt", "model999999.pt"):
        shutil.copy(source / FILE, source / name)
    assert find_checkpoint(source).name == "ema_0.9999_100000.pt"
    assert find_checkpoint(source, "model999999.pt") == source / "model999999.pt"
    assert find_checkpoint(source, source / FILE) == source / FILE
    shutil.copy(source / FILE, source / "ema_0.99_100000.pt")
    with pytest.raises(ModelFileError, match="same step"):
        find_checkpoint(source)
    with pytest.raises(ModelFileError, match=r"none\.pt: no such file"):
        find_checkpoint(source, "none.pt")


def test_folders_without_the_files_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such folder"):
        import_teacher(tmp_path / "none", tmp_path / "out")
    (source / "training_args.json").rename(source / "args.json")
    with pytest.raises(ModelFileError, match=r"training_args\.json: the file is missing"):
        import_teacher(source, tmp_path / "out")
    (source / FILE).rename(source / "model.pt")
    with pytest.raises(ModelFileError, match=r"but model\.pt"):
        import_teacher(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predict_xstart": False}, "predict_xstart must be True"),
        ({"learn_sigma": True}, "learn_sigma must be False"),
        ({"timestep_respacing": "ddim100"}, "timestep_respacing"),
        ({"noise_schedule": "spiral"}, "schedule must be one of"),
        ({"noise_schedule": ["sqrt"]}, "schedule must be a string"),
        ({"diffusion_steps": -1}, "num_timesteps"),
        ({"diffusion_steps": "2000"}, "num_timesteps must be a whole number"),
        ({"seq_len": 513}, "max_positions"),
        ({"dropout": "none"}, "dropout must be a number"),
        ({"hidden_dim": 64}, "hidden_dim = 64, the tensors say 32"),
        ({"bert_config": {"num_attention_heads": 3}}, "num_heads"),
        ({"bert_config": {"num_hidden_layers": 12}}, "num_hidden_layers = 12"),
        ({"bert_config": 7}, "bert_config must be an object"),
    ],
)
def test_settings_that_cannot_be_used_are_named(
    source: Path, change: dict[str, Any], message: str
) -> None:
    change_args(source, change)
    with pytest.raises(ModelFileError, match=message):
        import_teacher(source, source / "out")


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(name)


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: value})


def poke(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: state[name].clone().fill_(value)})


QUERY = "input_transformers.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(QUERY), f"1 tensor missing: {QUERY}"),
        (drop("lm_head.weight"), r"missing: lm_head\.weight"),
        (drop("position_ids"), "missing: position_ids"),
        (put("extra.weight", torch.zeros(1)), r"unexpected: extra\.weight"),
        (put("input_transformers.layer.2.output.dense.bias", torch.zeros(128)), "15 tensors miss"),
        (put(QUERY, torch.zeros(128, 127)), r"\(expected \[128, 128\], found \[128, 127\]\)"),
        (put("lm_head.weight", torch.zeros(5)), r"lm_head\.weight must be a matrix"),
        (put("lm_head.weight", torch.zeros(0, 32)), r"lm_head\.weight has no rows, is \[0, 32\]"),
        (put("lm_head.bias", torch.zeros(211).double()), r"lm_head\.bias \(float64\)"),
        (put("position_ids", torch.zeros(1, 512).long()), "position_ids must be"),
        (poke(QUERY, torch.nan), f"NaN or Infinity: {QUERY}"),
        (put("mean_embed", torch.zeros(32)), "DiffuSeq-v2"),
        (put("lm_head.weight", torch.zeros(1, 1).expand(211, 32)), "not a plain tensor"),
        (put("lm_head.bias", torch.zeros(211).to_sparse()), "_rebuild_sparse_tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    source: Path, state: dict[str, Tensor], change: Any, message: str
) -> None:
    changed = dict(state)
    change(changed)
    torch.save(changed, source / FILE)
    with pytest.raises(ModelFileError, match=message):
        import_teacher(source, source / "out")
    assert not (source / "out").exists()


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle", "inside"])
def test_a_hostile_file_executes_nothing(
    source: Path, tmp_path: Path, state: dict[str, Tensor], kind: str
) -> None:
    mark = tmp_path / "executed"
    payload: Any = Payload(mark)
    if kind == "inside":
        torch.save({**state, "lm_head.weight": payload}, source / FILE)
    elif kind == "bare pickle":
        (source / FILE).write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, source / FILE, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ModelFileError, match=r"asks for 'posix\.system'|not a complete file"):
        import_teacher(source, tmp_path / "out")
    assert not mark.exists()


def test_a_compressed_archive_is_not_opened(source: Path) -> None:
    with zipfile.ZipFile(source / FILE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(ModelFileError, match="compressed or overlapping"):
        import_teacher(source, source / "out")


def test_what_is_no_state_dict_is_named(source: Path) -> None:
    torch.save([1, 2], source / FILE)
    with pytest.raises(ModelFileError, match="expected a state dict, found list"):
        load_state_dict(source / FILE)
    torch.save({"a": 1}, source / FILE)
    with pytest.raises(ModelFileError, match="'a' is not a plain tensor"):
        load_state_dict(source / FILE)


@pytest.mark.parametrize("length", [0, 100, 1_000_000])
def test_a_truncated_file_is_named(source: Path, length: int) -> None:
    os.truncate(source / FILE, length)
    with pytest.raises(ModelFileError, match="not a complete file"):
        import_teacher(source, source / "out")


def test_a_flipped_bit_of_a_weight_is_noticed(source: Path) -> None:
    content = bytearray((source / FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (source / FILE).write_bytes(content)
    with pytest.raises(ModelFileError, match=r"the record .* is damaged"):
        import_teacher(source, source / "out")


def test_a_file_over_the_cap_is_not_opened(source: Path) -> None:
    with pytest.raises(ModelFileError, match="more than the limit of 1,000"):
        import_teacher(source, source / "out", max_bytes=1000)


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffuseq.torch, "__version__", "2.9.1+cu128")
    with pytest.raises(ModelFileError, match=r"install torch >= 2\.10"):
        load_state_dict(TINY / FILE)


def vocabulary(path: Path, size: int) -> Path:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(size - 5))]
    path.write_text("\n".join(tokens) + "\n")
    return path


def test_a_vocabulary_becomes_the_tokenizer(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not import_teacher(source, out).has_tokenizer
    assert load_folder(out).tokenizer_path is None
    vocab = vocabulary(tmp_path / "vocab.txt", 211)
    with pytest.raises(UsageError, match="--overwrite"):
        import_teacher(source, out, vocab=vocab)
    assert import_teacher(source, out, vocab=vocab, overwrite=True).has_tokenizer
    assert load_folder(out).tokenizer_path == out / "tokenizer.json"


def test_a_vocabulary_of_another_size_is_refused(source: Path, tmp_path: Path) -> None:
    vocab = vocabulary(tmp_path / "vocab.txt", 210)
    with pytest.raises(ModelFileError, match="has 210 tokens, the checkpoint 211"):
        import_teacher(source, tmp_path / "out", vocab=vocab)
    assert not (tmp_path / "out").exists()


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dlmone_fast.import_diffuseq", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_converts_and_warns(tmp_path: Path) -> None:
    done = run(TINY, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "399,827 parameters" in done.stdout
    assert "--vocab" in done.stdout
    assert "differ by up to" in done.stderr
    assert load_folder(tmp_path / "out").config["source"]["embedding"] == "raw"


def test_the_command_ends_with_the_documented_codes(tmp_path: Path) -> None:
    missing = run(tmp_path / "none", tmp_path / "out")
    assert missing.returncode == 4
    assert missing.stderr.startswith("error: ")
    assert "Traceback" not in missing.stderr
    assert run(TINY, tmp_path / "out", "--embedding", "best").returncode == 2


def text_of(out: Path) -> str:
    tokenizer = Tokenizer.from_file(out / "tokenizer.json")
    return tokenizer.decode_clean(tokenizer.encode(["The café"])[0])


@pytest.mark.parametrize(
    ("name", "lowercase", "written"),
    [
        ("bert-base-cased", None, "The café"),
        ("/uncased-runs/bert-base-cased/", None, "The café"),
        ("BERT-base-multilingual-Cased", None, "The café"),
        ("bert-base-uncased", None, "the cafe"),
        ("/models/bert-base-uncased", None, "the cafe"),
        ("bert-base-cased", True, "the cafe"),
        ("bert-base-uncased", False, "The café"),
        # Where the name does not tell, the vocabulary's words do.
        ("mine", None, "The café"),
        (None, None, "The café"),
    ],
)
def test_a_cased_checkpoint_keeps_its_capitals(
    source: Path, tmp_path: Path, name: str | None, lowercase: bool | None, written: str
) -> None:
    change_args(source, {"config_name": name})
    words = ["The", "the", "café", "cafe", *(f"W{i}" for i in range(211 - 9))]
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join([*SPECIAL_TOKENS, *words]) + "\n", encoding="utf-8")
    report = import_teacher(source, tmp_path / "out", vocab=vocab, lowercase=lowercase)
    assert text_of(tmp_path / "out") == written
    assert report.lowercase is (written == "the cafe")


def test_a_name_that_does_not_tell_leaves_an_uncased_vocabulary_uncased(
    source: Path, tmp_path: Path
) -> None:
    change_args(source, {"config_name": "mine"})
    import_teacher(source, tmp_path / "out", vocab=vocabulary(tmp_path / "vocab.txt", 211))
    assert Tokenizer.from_file(tmp_path / "out" / "tokenizer.json").lowercase


def test_the_command_has_a_flag_for_either_case(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocab = str(vocabulary(tmp_path / "vocab.txt", 211))
    arguments = [str(source), str(tmp_path / "out"), "--overwrite"]
    import_diffuseq.main([*arguments, "--vocab", vocab, "--cased"])
    assert not Tokenizer.from_file(tmp_path / "out" / "tokenizer.json").lowercase
    assert "tokenizer  with capitals and accents" in capsys.readouterr().out
    import_diffuseq.main([*arguments, "--vocab", vocab, "--uncased"])
    assert Tokenizer.from_file(tmp_path / "out" / "tokenizer.json").lowercase
    with pytest.raises(UsageError, match="--cased and --uncased"):
        import_diffuseq.main([*arguments, "--vocab", vocab, "--cased", "--uncased"])
    with pytest.raises(UsageError, match="add --vocab"):
        import_diffuseq.main([*arguments, "--cased"])
