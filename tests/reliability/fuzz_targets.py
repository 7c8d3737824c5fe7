"""What is fuzzed: for each kind of file a function of bytes that tells whether they were accepted.

It writes the file, opens it as the package does, and lets only the documented errors of that kind
of file pass; anything else is a finding. Input that begins with an odd byte is read as
instructions for editing a valid document, so that mutations get past the first checks.
"""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch

from dlmone_fast.config import from_dict, load_toml, resolve, to_toml
from dlmone_fast.errors import CheckpointError, ConfigError, DlmOneError, ModelFileError
from dlmone_fast.models.checkpoint import load_checkpoint, save_checkpoint
from dlmone_fast.models.denoiser import denoiser_from_folder
from dlmone_fast.models.diffuseq import load_state_dict, read_training_args
from dlmone_fast.models.diffuseq_convert import convert
from dlmone_fast.models.folder import ModelFolder, load_folder
from dlmone_fast.models.manifest import verify_manifest, write_manifest
from dlmone_fast.models.optimizer_state import flatten_optimizer, restore_optimizer
from dlmone_fast.models.plainfiles import parse_json
from dlmone_fast.models.tensors import read_tensors
from dlmone_fast.runtime import loading
from dlmone_fast.tokenizer import Tokenizer

Target = Callable[[bytes], bool]

_DIFFUSEQ = Path(__file__).parents[1] / "data" / "diffuseq-tiny"

# Values that parsers and checks get wrong.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, 10**400, 2**31, 2**63, 2**64, "", "0", "²",
    "a", "../x", "\0", "\ud800", "é" * 300, [], [[]], {}, {"": None}, ["a"] * 50, [1, "1", None],
)  # fmt: skip


class Feed:
    """Small numbers taken from bytes, zeros behind their end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def number(self, below: int) -> int:
        if below < 2 or self.place >= len(self.data):
            return 0
        size = 1 if below <= 256 else 2
        chunk = self.data[self.place : self.place + size]
        self.place += size
        return int.from_bytes(chunk, "little") % below

    def text(self) -> str:
        size = self.number(12)
        chunk = self.data[self.place : self.place + size]
        self.place += size
        return chunk.decode("latin-1")


def edited(document: Any, feed: Feed) -> Any:
    """A copy of nested dicts and lists after up to four edits at places that `feed` names."""
    document = copy.deepcopy(document)
    for _ in range(1 + feed.number(4)):
        holder = document
        while isinstance(holder, dict | list) and holder:
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            key = keys[feed.number(len(keys))]
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and feed.number(4):
                holder = inner
                continue
            _edit(holder, key, feed)
            break
    return document


def _edit(holder: Any, key: Any, feed: Feed) -> None:
    kind = feed.number(5)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        # A copy: the next edit may be within it.
        holder[key] = copy.deepcopy(ODD_VALUES[feed.number(len(ODD_VALUES))])
    elif kind == 2:
        holder[key] = feed.text()
    elif kind == 3:
        holder[key] = feed.number(1 << 16) - 1000
    elif isinstance(holder, dict):
        holder[feed.text()] = copy.deepcopy(holder[key])
    else:
        holder.append(copy.deepcopy(holder[key]))


def json_bytes(document: Any, data: bytes) -> bytes:
    """`data` itself, or, if it begins with an odd byte, the document edited by it, as JSON."""
    if not data[:1] or data[0] % 2 == 0:
        return data[1:]
    changed = edited(document, Feed(data[1:]))
    return (json.dumps(changed, indent=2, sort_keys=True) + "\n").encode()


def accepts(error: type[DlmOneError], name: str, action: Callable[[], object]) -> bool:
    """Whether the action does without `error`, the one that it may raise, which names `name`."""
    try:
        action()
    except DlmOneError as found:
        text = str(found)
        if type(found) is not error or name not in text or len(text) > 4000:
            raise AssertionError(f"expected a {error.__name__} that names {name}") from found
        return False
    return True


def manifest(folder: Path) -> Target:
    folder.mkdir()
    (folder / "a.txt").write_text("alpha")
    (folder / "b.bin").write_bytes(bytes(range(256)))
    write_manifest(folder)
    path = folder / "manifest.json"
    valid = json.loads(path.read_text())

    def target(data: bytes) -> bool:
        path.write_bytes(json_bytes(valid, data))
        return accepts(ModelFileError, str(folder), lambda: verify_manifest(folder))

    return target


def weights(folder: Path) -> Target:
    """A safetensors file: raw bytes, or an edited header before the tensors' bytes."""
    folder.mkdir()
    path = folder / "model.safetensors"
    valid = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
    }

    def target(data: bytes) -> bool:
        content = data[1:]
        if data[:1] and data[0] % 2:
            header = json.dumps(edited(valid, Feed(data[1:]))).encode()
            content = len(header).to_bytes(8, "little") + header + bytes(40)
        path.write_bytes(content)
        return accepts(
            ModelFileError, str(path), lambda: read_tensors(folder, path.name, ModelFileError)
        )

    return target


def config(folder: Path) -> Target:
    """config.json of a model folder, sealed again after each change."""
    tiny.save(folder)
    path = folder / "config.json"
    valid = json.loads(path.read_text(encoding="utf-8"))
    # Where it came from is not read, so that some edits are harmless.
    valid["source"] = {"task": "custom", "inputs": {"train": "x", "valid": "y"}}

    def target(data: bytes) -> bool:
        path.write_bytes(json_bytes(valid, data))
        write_manifest(folder)
        return accepts(ModelFileError, str(folder), lambda: _build(folder))

    return target


def _build(folder: Path) -> None:
    denoiser_from_folder(load_folder(folder))


def generation(folder: Path) -> Target:
    """generation_config.json of teachers and students."""
    opened = []
    for kind in ("teacher", "student"):
        model = load_folder(tiny.save(folder / kind, kind))
        opened.append((model, denoiser_from_folder(model)))

    def target(data: bytes) -> bool:
        model, denoiser = opened[len(data) % 2]
        where = model.path / "generation_config.json"

        def read() -> ModelFolder:
            content = json_bytes(model.generation_config, data)
            return replace(model, generation_config=parse_json(content, where, ModelFileError))

        return accepts(ModelFileError, str(where), lambda: loading._settings(read(), denoiser))

    return target


def tokenizer(folder: Path) -> Target:
    folder.mkdir()
    path = folder / "tokenizer.json"
    # Few words: building a vocabulary is most of the work.
    valid = json.loads(Tokenizer.from_words(["ba", "ce", "di"]).to_json())

    def target(data: bytes) -> bool:
        path.write_bytes(json_bytes(valid, data))
        return accepts(ModelFileError, str(path), lambda: _probe(Tokenizer.from_file(path)))

    return target


def vocabulary(folder: Path) -> Target:
    folder.mkdir()
    path = folder / "vocab.txt"

    def target(data: bytes) -> bool:
        path.write_bytes(data)
        return accepts(ModelFileError, str(path), lambda: _probe(Tokenizer.from_vocab_file(path)))

    return target


def _probe(tokens: Tokenizer) -> None:
    ids = tokens.encode(["ba ce [SEP] Çé\u200d x", ""])
    assert [row[0] for row in ids] == [tokens.cls_id] * 2
    tokens.decode_clean(ids[0])
    tokens.to_json()


def toml(folder: Path) -> Target:
    folder.mkdir()
    path = folder / "run.toml"

    def target(data: bytes) -> bool:
        path.write_bytes(data)
        return accepts(ConfigError, "", lambda: _round_trip(path))

    return target


def _round_trip(path: Path) -> None:
    """What is accepted must read back the same."""
    found = resolve(file=path)
    path.write_text(to_toml(found), encoding="utf-8")
    assert from_dict(load_toml(path)) == found


def state(folder: Path) -> Target:
    """state.json of a checkpoint, sealed again after each change."""
    tensors = {"model": {"w": torch.arange(4.0)}, "ema": {"w": torch.zeros(4)}}
    path = save_checkpoint(folder, 3, tensors, {"skipped": 0, "inputs": {"train": "x"}}, "seed = 0")
    valid = json.loads((path / "state.json").read_text())

    def target(data: bytes) -> bool:
        (path / "state.json").write_bytes(json_bytes(valid, data))
        write_manifest(path)
        return accepts(CheckpointError, str(path), lambda: load_checkpoint(path))

    return target


def optimizer(folder: Path) -> Target:
    """The JSON part of an optimiser's state."""
    module = torch.nn.Linear(2, 2)
    adamw = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    adamw.step()
    parameters = dict(module.named_parameters())
    state, valid = flatten_optimizer(adamw, parameters)
    tensors = {name: tensor.clone() for name, tensor in state.items()}
    # As a file gives it: lists for tuples, which edits reach into.
    valid = json.loads(json.dumps(valid))

    def restore_and_step(document: dict[str, Any]) -> None:
        # Copies: a step works on what was restored.
        fresh = {name: tensor.clone() for name, tensor in tensors.items()}
        restore_optimizer(adamw, parameters, fresh, document)
        # What is accepted must also work.
        adamw.step()

    def target(data: bytes) -> bool:
        document = edited(valid, Feed(data[1:]))
        return accepts(CheckpointError, "optimizer", lambda: restore_and_step(document))

    return target


def training_args(folder: Path) -> Target:
    """training_args.json beside a DiffuSeq checkpoint."""
    folder.mkdir()
    path = folder / "training_args.json"
    valid = json.loads((_DIFFUSEQ / path.name).read_text())
    tensors = load_state_dict(_DIFFUSEQ / "ema_0.9999_050000.pt")
    tensors["lm_head.weight"] = tensors["word_embedding.weight"]

    def target(data: bytes) -> bool:
        path.write_bytes(json_bytes(valid, data))
        return accepts(
            ModelFileError, path.name, lambda: convert(tensors, read_training_args(folder), path)
        )

    return target


def archive(folder: Path) -> Target:
    """A .pt file around the fuzzed pickle; the other records are those of torch.save."""
    folder.mkdir()
    path = folder / "ema_1.pt"

    def target(data: bytes) -> bool:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("ema_1/data.pkl", data)
            file.writestr("ema_1/version", "3\n")
            file.writestr("ema_1/byteorder", "little")
            for record in ("0", "1"):
                file.writestr(f"ema_1/data/{record}", bytes(32))
        return accepts(ModelFileError, str(path), lambda: load_state_dict(path))

    return target


TARGETS: dict[str, Callable[[Path], Target]] = {
    "manifest": manifest,
    "weights": weights,
    "config": config,
    "generation": generation,
    "tokenizer": tokenizer,
    "vocabulary": vocabulary,
    "toml": toml,
    "state": state,
    "optimizer": optimizer,
    "training_args": training_args,
    "archive": archive,
}


def seeds(name: str) -> list[bytes]:
    """Inputs to start from: valid files, and instructions for edits."""
    edits = [b"\1" + bytes([i, 255 - i, 3 * i % 256, i, 1, 2, 3, 4]) for i in range(0, 250, 25)]
    if name in ("vocabulary",):
        return [b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nba\n##ce\n", b"[PAD]\r\n"]
    if name == "toml":
        presets = [to_toml(resolve(preset)).encode() for preset in ("grammar", "qqp-small")]
        return [*presets, b"seed = 1\n[teacher]\nsteps = 3\n", b'a.b."c" = [1, {d = 1e3}]\n']
    if name == "archive":
        return [_pickle_of_tensors()]
    return [*edits, b"\0{}", b'\0{"format": "x", "version": 1}', b"\0[1, 2.5e3, null]"]


def _pickle_of_tensors() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(8), "b": torch.nn.Parameter(torch.ones(2, 4))}, stream)
    with zipfile.ZipFile(stream) as file:
        name = next(entry for entry in file.namelist() if entry.endswith("data.pkl"))
        return file.read(name)
