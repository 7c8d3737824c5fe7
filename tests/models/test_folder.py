"""Model folders: what is saved is what loads, and nothing damaged loads."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dlmone_fast.errors import ModelFileError, UsageError
from dlmone_fast.models import folder as module
from dlmone_fast.models.folder import check_tensors, copy_folder, load_folder, save_folder
from dlmone_fast.models.manifest import write_manifest

CONFIG: dict[str, Any] = {"kind": "student", "model": {"seq_len": 16}, "diffusion": {}}


def weights() -> dict[str, torch.Tensor]:
    values = torch.arange(24, dtype=torch.float32)
    return {"tokens.weight": values.reshape(6, 4), "tokens.bias": values[:6].bfloat16()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(
        tmp_path / "model",
        config=CONFIG,
        tensors=weights(),
        tokenizer_json='{"model": {}}',
        generation_config={"steps": 1},
        card="# Card\n",
        extra_json={"training_summary.json": {"bleu": 0.5}},
    )


def test_a_folder_round_trips(folder: Path) -> None:
    loaded = load_folder(str(folder))
    assert loaded.config["kind"] == "student"
    assert loaded.config["model"] == {"seq_len": 16}
    assert loaded.generation_config == {"steps": 1}
    assert loaded.tokenizer_path == folder / "tokenizer.json"
    assert loaded.read_json("training_summary.json") == {"bleu": 0.5}
    for name, tensor in weights().items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)


def test_files_are_readable_as_the_umask_says(folder: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) == 1


def test_loaded_tensors_do_not_hang_on_the_file(folder: Path) -> None:
    loaded = load_folder(folder)
    os.truncate(folder / "model.safetensors", 0)
    assert torch.equal(loaded.tensors["tokens.weight"], weights()["tokens.weight"])


def test_tied_and_sliced_tensors_are_stored_in_full(tmp_path: Path) -> None:
    whole = torch.randn(8, 4)
    tensors = {"a": whole, "b": whole, "slice": whole[2:4], "transposed": whole.T}
    loaded = load_folder(save_folder(tmp_path / "m", config=CONFIG, tensors=tensors))
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 4 * (3 * 32 + 8) + 1000


def test_shards_hold_everything_once_and_stay_under_the_limit(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.full((10, 10), float(i)) for i in range(7)}
    folder = save_folder(tmp_path / "m", config=CONFIG, tensors=tensors, max_shard_bytes=1000)
    loaded = load_folder(folder)
    assert loaded.config["weights"] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())
    assert all((folder / name).stat().st_size < 1400 for name in loaded.config["weights"])
    with pytest.raises(UsageError, match=r"layer\.0 alone"):
        save_folder(tmp_path / "m", config=CONFIG, tensors=tensors, max_shard_bytes=100)


def test_every_damage_is_an_error_that_names_the_file(
    folder: Path, damaged_copies: Callable[..., Iterator[tuple[Path, str, str]]]
) -> None:
    for copy, name, _ in damaged_copies(folder, 210):
        # A damaged manifest may blame the file that it now misstates.
        blamed = re.escape(str(copy)) if name == "manifest.json" else re.escape(name)
        with pytest.raises(ModelFileError, match=blamed):
            load_folder(copy)


def test_a_folder_that_is_replaced_while_it_is_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = module.read_tensors

    def replaced_first(*arguments: Any) -> dict[str, torch.Tensor]:
        # Same names and shapes: nothing but the manifest tells the two apart.
        other = {name: tensor + 1 for name, tensor in weights().items()}
        save_folder(folder, config=CONFIG, tensors=other)
        return read(*arguments)

    monkeypatch.setattr(module, "read_tensors", replaced_first)
    with pytest.raises(ModelFileError, match="was changed while it was read; load it again"):
        load_folder(folder)


def test_a_file_read_later_is_what_was_verified(folder: Path) -> None:
    loaded = load_folder(folder)
    (folder / "training_summary.json").write_text('{"bleu": 1.0}')
    write_manifest(folder)
    with pytest.raises(ModelFileError, match=r"training_summary\.json: was changed after"):
        loaded.read_json("training_summary.json")


def test_a_copy_is_what_was_loaded(folder: Path, tmp_path: Path) -> None:
    loaded = load_folder(folder)
    copied = copy_folder(loaded, tmp_path / "copy")
    assert load_folder(copied).files == loaded.files
    save_folder(folder, config=CONFIG, tensors={"other": torch.zeros(3)}, card="# Card\n")
    with pytest.raises(ModelFileError, match=r"is not what was loaded|file is missing"):
        copy_folder(loaded, copied)
    assert load_folder(copied).files == loaded.files


def test_weights_of_a_dtype_that_is_never_stored_are_refused(folder: Path) -> None:
    tensors = {**weights(), "tokens.bias": torch.zeros(6, dtype=torch.float8_e4m3fn)}
    save_file(tensors, folder / "model.safetensors")
    write_manifest(folder)
    with pytest.raises(ModelFileError, match=r"'tokens\.bias' is float8_e4m3fn"):
        load_folder(folder)


def test_a_message_names_no_endless_names(folder: Path) -> None:
    names = [letter * 50_000 for letter in "abcde"]
    save_file({name: torch.zeros(1) for name in names}, folder / "model.safetensors")
    write_manifest(folder)
    with pytest.raises(ModelFileError, match="5 tensors unexpected: aaaa") as caught:
        check_tensors(expected(), load_folder(folder).tensors, "here")
    assert len(str(caught.value)) < 2000


def test_a_file_that_is_not_listed_is_not_read(folder: Path) -> None:
    (folder / ".DS_Store").write_text("x")
    load_folder(folder)
    (folder / "tokenizer.json").unlink()
    write_manifest(folder)
    assert load_folder(folder).tokenizer_path is None
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: is not listed"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "llama"}, "format must be"),
        ({"version": 2}, "install a newer"),
        ({"version": "1"}, "version must be"),
        ({"kind": "cat"}, "kind must be teacher or student"),
        ({"model": []}, "object 'model'"),
        ({"generation": 3}, "'generation' must be an object"),
        ({"weights": ["../model.safetensors"]}, "weights must list"),
        ({"weights": []}, "weights must list"),
        ({"weights": ["model.safetensors"] * 2}, "weights must list"),
        ({"weights": ["model-2.safetensors"]}, r"model-2\.safetensors: is not listed"),
    ],
)
def test_a_bad_config_is_named(folder: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    write_manifest(folder)
    with pytest.raises(ModelFileError, match=message):
        load_folder(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, (10**12).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}x"],
)
def test_a_sealed_file_that_is_not_safetensors_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    write_manifest(folder)
    with pytest.raises(ModelFileError, match="not a valid safetensors file"):
        load_folder(folder)


def test_a_tensor_in_two_shards_is_named(folder: Path) -> None:
    save_file(weights(), folder / "model-b.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["weights"].append("model-b.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder)
    with pytest.raises(ModelFileError, match=r"in another weight file as well"):
        load_folder(folder)


def test_weights_that_are_not_finite_are_not_saved(folder: Path) -> None:
    bad = weights()
    bad["tokens.weight"][1, 2] = torch.nan
    with pytest.raises(ModelFileError, match=r"NaN or Infinity: tokens\.weight"):
        save_folder(folder, config=CONFIG, tensors=bad)
    assert torch.equal(load_folder(folder).tensors["tokens.weight"], weights()["tokens.weight"])


@pytest.mark.parametrize("name", ["config.json", "../x.json", "x.txt", ".json"])
def test_extra_files_cannot_take_a_reserved_or_strange_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="extra_json"):
        save_folder(tmp_path / "m", config=CONFIG, tensors=weights(), extra_json={name: {}})


def test_a_full_disk_while_writing_tensors_keeps_the_old_folder(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(ModelFileError, match="ulimit"):
            save_folder(folder, config=CONFIG, tensors={"big": torch.zeros(100, 100)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "tokens.weight" in load_folder(folder).tensors
    assert os.listdir(folder.parent) == ["model"]


def test_a_replacement_cut_between_its_renames_still_loads(folder: Path) -> None:
    folder.rename(folder.with_name(".old-model"))
    assert torch.equal(load_folder(folder).tensors["tokens.weight"], weights()["tokens.weight"])


def expected() -> dict[str, tuple[int, ...]]:
    return {"tokens.weight": (6, 4), "tokens.bias": (6,)}


def test_fitting_tensors_pass() -> None:
    check_tensors(expected(), weights(), "here")


def test_each_misfit_is_named_with_its_nearest_name_and_count() -> None:
    tensors = {"token.weight": torch.zeros(6, 4), "tokens.bias": torch.zeros(7)}
    tensors |= {f"more.{i}": torch.zeros(1) for i in range(5)}
    with pytest.raises(ModelFileError) as caught:
        check_tensors(expected(), tensors, "here")
    message = str(caught.value)
    assert message.startswith("here: 1 tensor missing: tokens.weight (nearest found: token.weight)")
    assert "6 tensors unexpected: more.0, more.1, more.2 and 3 more" in message
    assert "tokens.bias (expected [6], found [7])" in message


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(6, dtype=torch.int64), r"tokens\.bias \(int64\)"),
        (torch.zeros(6, dtype=torch.float64), r"tokens\.bias \(float64\)"),
        (torch.full((6,), torch.inf), r"NaN or Infinity: tokens\.bias"),
    ],
)
def test_wrong_dtypes_and_values_are_named(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        check_tensors(expected(), weights() | {"tokens.bias": tensor}, "here")
