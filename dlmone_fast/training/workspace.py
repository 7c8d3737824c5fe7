"""The run folder: resolved configuration, tokenizer, token caches, checkpoints, model folders.

RUN/config.toml          the resolved configuration
RUN/tokenizer.json
RUN/data/                rows of a generated task
RUN/cache/               token caches
RUN/checkpoints/PHASE/   training checkpoints of teacher, pairs, stage1, stage2; the last one of
                         pairs is what that phase ends with
RUN/teacher/ RUN/stage1/ RUN/stage2/    model folders
RUN/metrics.jsonl
RUN/.lock                held while a training runs here, with its process id
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dlmone_fast.aligned_tokenizer import AlignedTokenizer, read_tokenizer
from dlmone_fast.config import Config, from_dict, load_toml, to_dict, to_toml
from dlmone_fast.data.cache import TokenCache, open_or_build
from dlmone_fast.data.rows import find_split, read_rows
from dlmone_fast.errors import CheckpointError, ConfigError, DataError, PromptError
from dlmone_fast.files import write_atomically
from dlmone_fast.models.checkpoint import find_latest, load_checkpoint
from dlmone_fast.models.folder import load_folder
from dlmone_fast.models.manifest import MANIFEST_NAME, hash_file
from dlmone_fast.models.plainfiles import unwritable
from dlmone_fast.packaged import DATA
from dlmone_fast.tasks import grammar
from dlmone_fast.text_tokenizer import TextTokenizer
from dlmone_fast.tokenizer import Tokenizer
from dlmone_fast.training.ranks import Ranks
from dlmone_fast.training.signals import TimeLimit
from dlmone_fast.training.window import timestep_window

PHASES = ("teacher", "pairs", "stage1", "stage2")

_GENERATED_ROWS = 1000

# What may differ between two starts of one run: none of it changes the plan. Another device,
# precision or compile may still change the last bits of the numbers.
_FREE_KEYS = (
    "output_dir",
    "data_dir",
    "device",
    "compile",
    "precision",
    "log_every",
    "max_bad_steps",
    "max_minutes",
    "rank_minutes",
    "evaluation",
    "preset",
)


@dataclass(frozen=True)
class Workspace:
    """An open run folder."""

    config: Config
    root: Path
    data_dir: Path
    device: torch.device
    tokenizer: TextTokenizer
    limit: TimeLimit = field(default_factory=TimeLimit)
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def bf16(self) -> bool:
        """Whether forward passes run in bf16 autocast."""
        precision = self.config.precision
        return precision == "bf16" or (precision == "auto" and multiplies_bf16(self.device))

    def cache(self, split: str) -> TokenCache:
        """The token cache of a split, built on first use; training may read it both ways."""
        path = find_split(self.data_dir, split)
        cache = open_or_build(path, self.tokenizer, self.root / "cache")
        both = split == "train" and self.config.data.both_directions
        return replace(cache, both_directions=both)

    def inputs(self, **folders: Path) -> dict[str, str]:
        """Hashes of the data, and of the model folders that a phase starts from."""
        data = {split: self.cache(split).folder.name for split in ("train", "valid")}
        return data | {name: hash_file(folder / MANIFEST_NAME) for name, folder in folders.items()}

    def checkpoints(self, phase: str) -> Path:
        """Where a phase keeps its training checkpoints."""
        return self.root / "checkpoints" / phase

    def model(self, phase: str) -> Path:
        """The model folder that a phase ends with."""
        return self.root / phase

    def clear(self, phase: str) -> None:
        """Remove a phase's checkpoints and model folder, to run it again."""
        if self.ranks.writes:
            for folder in (self.checkpoints(phase), self.model(phase)):
                shutil.rmtree(folder, ignore_errors=True)
        self.ranks.wait()

    def check_time(self, before: str) -> None:
        """Do not let the next part of the run begin when the time is up on any rank.

        Raises:
            InterruptedAndSavedError: it is, and everything so far is saved.
        """
        if self.ranks.any(self.limit.ends_here())[0]:
            raise self.limit.stopped(before)

    def newest(self, phase: str) -> Path | None:
        """The newest intact checkpoint of a phase."""
        return find_latest(self.checkpoints(phase))[0]

    def finished(self, phase: str, inputs: dict[str, str] | None = None) -> bool:
        """Whether a phase has written what it ends with: its model folder, or all pairs.

        Raises:
            ConfigError: it did so from other inputs than the given ones.
        """
        if phase == "pairs":
            return self._has_pairs(inputs)
        folder = self.model(phase)
        if not (folder / MANIFEST_NAME).exists():
            return False
        if inputs is not None:
            check_inputs(folder, load_folder(folder).config.get("source", {}).get("inputs"), inputs)
        return True

    def _has_pairs(self, inputs: dict[str, str] | None) -> bool:
        newest = self.newest("pairs")
        if newest is None:
            return False
        checkpoint = load_checkpoint(newest)
        if checkpoint.step < self.config.distill.pairs.updates:
            return False
        if inputs is not None:
            check_inputs(newest, checkpoint.state.get("inputs"), inputs)
        return True


def open_workspace(
    config: Config,
    tokenizer: TextTokenizer | None = None,
    resume: str = "auto",
    started: float | None = None,
    ranks: Ranks | None = None,
) -> Workspace:
    """Create or reopen the run folder of a configuration.

    Args:
        config: the run's configuration.
        tokenizer: use this one (a given teacher's); None: the run's own, from `data.vocab_file`
            or learned on the training split.
        resume: "never" starts over: the phases of an earlier run in the folder are removed.
        started: since when `max_minutes` counts, by `time.monotonic()`; None: now.
        ranks: the processes of the run; the folder is one that all of them see.

    Raises:
        ConfigError: the folder holds a run of another configuration, the vocabulary differs, or
            leaves no timestep for distillation.
        DataError: data files are missing or malformed.
        ModelFileError: the folder cannot be written (CheckpointError), or its tokenizer.
    """
    limit = TimeLimit(config.max_minutes, started)
    ranks = ranks or Ranks()
    device = ranks.device(config.device)
    with ranks.in_turn():
        if not ranks.writes:
            resume = "auto"
        config, root, data_dir, tokenizer = _opened(config, tokenizer, resume)
        workspace = Workspace(config, root, data_dir, device, tokenizer, limit, ranks)
        if ranks.size > 1:
            # Built by the first rank; alone, when a phase asks for them.
            for split in ("train", "valid"):
                workspace.cache(split)
    return workspace


def _opened(
    config: Config, tokenizer: TextTokenizer | None, resume: str
) -> tuple[Config, Path, Path, TextTokenizer]:
    root = run_folder(config)
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        if resume == "never":
            _clear(root)
    data_dir = _data_dir(config, root)
    if tokenizer is None:
        tokenizer = _tokenizer(config, root, data_dir)
    config = with_vocabulary(config, tokenizer)
    if isinstance(tokenizer, AlignedTokenizer):
        _check_words(data_dir, tokenizer)
    timestep_window(config)
    _check_same_run(root, config)
    with writing(root / "config.toml"):
        write_atomically(root / "config.toml", [to_toml(config).encode()])
    return config, root, data_dir, tokenizer


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write of something in the run folder into a CheckpointError that names it."""
    try:
        yield
    except OSError as reason:
        raise CheckpointError(unwritable(path, reason)) from reason


def check_inputs(where: Path, found: Any, expected: dict[str, str]) -> None:
    """Refuse to continue from what was made of other data or another teacher."""
    changed = [name for name in expected if not found or found.get(name) != expected[name]]
    if changed:
        raise ConfigError(
            f"{where}: was made from another {' and '.join(changed)} than is given now; name the "
            "same data and teacher, use another --output-dir, or start over with "
            "--phase all --resume never"
        )


def run_folder(config: Config) -> Path:
    """The run folder that a configuration names."""
    return Path(config.output_dir or f"runs/{config.preset}")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 natively; emulated, it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for a CPU; a version without this one computes in fp32.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())


def with_vocabulary(config: Config, tokenizer: TextTokenizer) -> Config:
    """The configuration with the tokenizer's vocabulary size, which must not contradict it."""
    if config.data.tokenizer != tokenizer.kind:
        raise ConfigError(
            f"data.tokenizer is {config.data.tokenizer!r}, the tokenizer of the run or its teacher "
            f"is {tokenizer.kind!r}; set data.tokenizer = {tokenizer.kind!r}, or use another "
            "--output-dir or teacher"
        )
    wanted, found = config.model.vocab_size, tokenizer.vocab_size
    if wanted not in (0, found):
        raise ConfigError(
            f"model.vocab_size is {wanted}, the tokenizer has {found} tokens; set it to {found}, "
            "to 0 (taken from the tokenizer), or name another data.vocab_file"
        )
    return replace(config, model=replace(config.model, vocab_size=found))


def _data_dir(config: Config, root: Path) -> Path:
    if not config.is_grammar:
        if not config.data_dir and config.data.task in DATA:
            return DATA[config.data.task]
        if not config.data_dir:
            raise DataError(
                f"--data-dir is missing: preset {config.preset!r} reads "
                "{train,valid,test}.jsonl[.gz] with src and trg from it; name the folder"
            )
        return Path(config.data_dir)
    folder = root / "data"
    # Each split is written in one step and train.jsonl last: it proves them all.
    if not (folder / "train.jsonl").exists():
        train, valid, test = config.data.train_rows, _GENERATED_ROWS, _GENERATED_ROWS
        grammar.write_splits(folder, config.data.task, config.seed, train, valid, test)
    return folder


def _tokenizer(config: Config, root: Path, data_dir: Path) -> TextTokenizer:
    saved = root / "tokenizer.json"
    tokenizer: TextTokenizer
    if saved.exists():
        tokenizer = read_tokenizer(saved)
        tokenizer.max_chars = config.data.max_chars
        return tokenizer
    tokenizer = make_tokenizer(config, data_dir)
    tokenizer.save(saved)
    return tokenizer


def make_tokenizer(config: Config, data_dir: Path) -> TextTokenizer:
    """The tokenizer that a configuration asks for, made anew; nothing is written.

    Raises:
        DataError, ModelFileError: the vocabulary or the rows to learn it on cannot be read.
        ConfigError: the vocabulary's case is not the configuration's.
    """
    data = config.data
    tokenizer: TextTokenizer
    if config.is_grammar:
        tokenizer = Tokenizer.from_words(grammar.vocabulary(data.task))
    elif data.tokenizer == "aligned":
        pairs = ((row.src, row.trg) for row in read_rows(find_split(data_dir, "train")))
        tokenizer = AlignedTokenizer.learn(pairs, output_case="upper")
    elif data.vocab_file:
        tokenizer = tokenizer_of_file(config, data_dir)
    else:
        tokenizer = Tokenizer.learn(
            _texts(find_split(data_dir, "train")),
            data.vocab_size,
            data.lowercase,
            data.strips_accents or False,
        )
    tokenizer.max_chars = data.max_chars
    return tokenizer


def tokenizer_of_file(config: Config, data_dir: Path) -> Tokenizer:
    """The tokenizer of `data.vocab_file`.

    Raises:
        DataError: it is not found; ModelFileError: it cannot be read.
        ConfigError: text would be lower-cased for a vocabulary of words with capitals.
    """
    data = config.data
    path = find_vocabulary(data.vocab_file, data_dir)
    tokenizer = Tokenizer.from_vocab_file(path, data.lowercase, data.strips_accents)
    if data.lowercase and tokenizer.is_cased:
        raise ConfigError(
            f"data.lowercase is true, and {path} is a cased vocabulary, whose words with capitals "
            "would never be used; set data.lowercase = false (--data.no-lowercase), or name an "
            "uncased data.vocab_file"
        )
    return tokenizer


def _check_words(data_dir: Path, tokenizer: AlignedTokenizer) -> None:
    """Refuse words that are to be scored and cannot be read, now rather than after training."""
    for split in ("valid", "test"):
        try:
            path = find_split(data_dir, split)
        except DataError:
            # What is missing is told by what needs it.
            continue
        for row in read_rows(path):
            try:
                tokenizer.encode([row.src], [f"{path}, line {row.line}"].__getitem__)
            except PromptError as error:
                raise DataError(str(error)) from error


def find_vocabulary(name: str, data_dir: Path) -> Path:
    """The vocabulary file, relative to the working folder, the data folder or its parent."""
    places = [Path(name), data_dir / name, data_dir.parent / name]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise DataError(f"data.vocab_file {name!r} is not found (looked at {looked}); give its path")


def _texts(path: Path) -> Iterator[str]:
    for row in read_rows(path):
        yield row.src
        yield row.trg


def _clear(root: Path) -> None:
    for name in (*PHASES, "checkpoints", "data", "tensorboard"):
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("config.toml", "tokenizer.json", "metrics.jsonl"):
        (root / name).unlink(missing_ok=True)


def _check_same_run(root: Path, config: Config) -> None:
    file = root / "config.toml"
    if not file.exists():
        return
    try:
        before = to_dict(from_dict(load_toml(file)))
    except ConfigError as error:
        reason = str(error).removeprefix(f"--config {file}: ")
        raise ConfigError(
            f"{file}: is not a configuration of this version ({reason}); use another --output-dir, "
            "or start over with --phase all --resume never"
        ) from error
    changed = list(_differences(before, to_dict(config)))
    if changed:
        raise ConfigError(
            f"{root} holds a run with another configuration ({'; '.join(changed[:5])}); use "
            "another --output-dir, or start over with --phase all --resume never"
        )


def _differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in now.items():
        if not path and key in _FREE_KEYS:
            continue
        if isinstance(value, dict):
            yield from _differences(before[key], value, f"{path}{key}.")
        elif before[key] != value:
            yield f"{path}{key}: {before[key]!r} there, {value!r} now"
