"""The run folder: resolved configuration, tokenizer, token caches, checkpoints, model folders.

RUN/run.json             hashes of what the run wrote, and what that was made from
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

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dlmone_fast.aligned_tokenizer import AlignedTokenizer, read_tokenizer
from dlmone_fast.config import Config, from_dict, load_toml, to_dict, to_toml
from dlmone_fast.data.cache import TokenCache, open_or_build
from dlmone_fast.data.rows import find_split, read_rows
from dlmone_fast.errors import (
    BackendUnavailableError,
    ConfigError,
    DataError,
    PromptError,
    UsageError,
)
from dlmone_fast.models.checkpoint import find_latest, load_checkpoint
from dlmone_fast.models.folder import load_folder
from dlmone_fast.models.manifest import MANIFEST_NAME, hash_file
from dlmone_fast.models.pretrained import Pretrained, prune_vocabulary, read_pretrained
from dlmone_fast.packaged import DATA
from dlmone_fast.runtime.engines.compiled import why_not_compile
from dlmone_fast.tasks import grammar
from dlmone_fast.text_tokenizer import TextTokenizer
from dlmone_fast.tokenizer import Tokenizer
from dlmone_fast.training.owned import (
    PHASES,
    RunRecord,
    StrPath,
    check_files,
    check_free,
    check_removable,
    has_trained,
    read_record,
    remove,
    writing,
)
from dlmone_fast.training.ranks import Ranks
from dlmone_fast.training.run_files import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    data_hashes,
    data_source,
    is_given,
    record_files,
    same_run,
    write_files,
)
from dlmone_fast.training.signals import TimeLimit
from dlmone_fast.training.start import with_start
from dlmone_fast.training.window import timestep_window

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
    # By its content, which the teacher's inputs and the vocabulary name.
    "model.start_from",
)
# What of `data` a run's tokenizer depends on, as far as the configuration has it.
_TOKENIZER_KEYS = (
    "tokenizer", "vocab_file", "vocab_size", "lowercase", "strip_accents", "prune_below",
)  # fmt: skip


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
    keep: tuple[StrPath, ...] = ()
    """Files and folders of the caller's, which the run neither removes nor replaces."""

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
        if not folders and self.config.model.start_from:
            data["start"] = read_pretrained(self.config.model.start_from).sha256
        return data | {name: hash_file(folder / MANIFEST_NAME) for name, folder in folders.items()}

    def checkpoints(self, phase: str) -> Path:
        """Where a phase keeps its training checkpoints."""
        return self.root / "checkpoints" / phase

    def model(self, phase: str) -> Path:
        """The model folder that a phase ends with."""
        return self.root / phase

    def clear(self, *phases: str) -> None:
        """Remove the checkpoints and model folders of phases, to run them again.

        Raises:
            UsageError: something there is not proven to be a run's; nothing has been removed.
        """
        if self.ranks.writes:
            record = read_record(self.root)
            check_removable(self.root, record, phases, self.keep)
            with writing(self.root):
                remove(self.root, record, phases, self.keep)
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
            UsageError: the model folder is not of this phase of a run.
        """
        if phase == "pairs":
            return self._has_pairs(inputs)
        folder = self.model(phase)
        if not os.path.exists(folder / MANIFEST_NAME):
            return False
        if inputs is not None:
            source = load_folder(folder).config.get("source", {})
            if source.get("phase") != phase:
                raise UsageError(
                    f"{folder}: is a model folder that the phase {phase} of a run did not write, "
                    "and it would write its own there; move it away, or use another --output-dir "
                    "(a teacher to distil is named with --teacher)"
                )
            check_inputs(folder, source.get("inputs"), inputs)
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
    keep: Sequence[StrPath] = (),
) -> Workspace:
    """Create or reopen the run folder of a configuration.

    Everything is checked before anything is removed or written.

    Args:
        config: the run's configuration.
        tokenizer: use this one (a given teacher's); None: the run's own, from `data.vocab_file`
            or learned on the training split.
        resume: "never" starts over: what is proven to be an earlier run's in the folder is removed.
        started: since when `max_minutes` counts, by `time.monotonic()`; None: now.
        ranks: the processes of the run; the folder is one that all of them see.
        keep: files and folders of the caller's, beside `data_dir`, that are not removed or
            replaced wherever they lie.

    Raises:
        ConfigError: the folder holds a run of another configuration, the vocabulary differs, or
            leaves no timestep for distillation.
        UsageError: something that no run wrote is in the way.
        BackendUnavailableError: the configuration compiles, and nothing can be compiled here.
        DataError: data files are missing or malformed.
        ModelFileError: the folder cannot be written (CheckpointError), or its tokenizer.
    """
    limit = TimeLimit(config.max_minutes, started)
    ranks = ranks or Ranks()
    device = ranks.device(config.device)
    if config.compile and (reason := why_not_compile(device)):
        raise BackendUnavailableError(f"compile is on and cannot run: {reason}; or turn it off")
    keep = (*keep, config.data_dir)
    with ranks.in_turn():
        fresh = resume == "never" and ranks.writes
        config, data_dir, tokenizer = _opened(config, tokenizer, fresh, keep, ranks.writes)
        workspace = Workspace(
            config, run_folder(config), data_dir, device, tokenizer, limit, ranks, keep
        )
        if ranks.size > 1:
            # Built by the first rank; alone, when a phase asks for them.
            for split in ("train", "valid"):
                workspace.cache(split)
    return workspace


def _opened(
    config: Config,
    tokenizer: TextTokenizer | None,
    fresh: bool,
    keep: Sequence[StrPath],
    writes: bool,
) -> tuple[Config, Path, TextTokenizer]:
    start = _start(config, given=tokenizer is not None)
    if start is not None:
        config = with_start(config, start)
    root = run_folder(config)
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    before = read_record(root)
    check_free(root)
    data_dir = _data_dir(config, root)
    if fresh:
        check_removable(root, before, PHASES, keep)
    else:
        _check_same_run(root, config, before)
    # Files of the run by name: what to write, or None where what is there is right.
    contents: dict[str, bytes | None] = {}
    made_from: dict[str, dict[str, Any]] = {}
    if tokenizer is None:
        made_from[TOKENIZER_NAME] = tokenizer_source(config, data_dir)
        if start is not None:
            made_from[TOKENIZER_NAME]["start"] = start.sha256
        saved = None if fresh else _saved_tokenizer(root, before, made_from[TOKENIZER_NAME])
        tokenizer = saved or make_tokenizer(config, data_dir, start)
        contents[TOKENIZER_NAME] = None if saved else tokenizer.to_json().encode()
    tokenizer.max_chars = config.data.max_chars
    config = with_vocabulary(config, tokenizer)
    if isinstance(tokenizer, AlignedTokenizer):
        _check_words(data_dir, tokenizer)
    timestep_window(config)
    if not fresh:
        _check_same_run(root, config, before)
    contents[CONFIG_NAME] = to_toml(config).encode()
    if before and not fresh and is_given(root / CONFIG_NAME, keep):
        # It is of this run: what differs from it decides nothing.
        contents[CONFIG_NAME] = None
    wanted = {
        name: hash_file(root / name) if content is None else hashlib.sha256(content).hexdigest()
        for name, content in contents.items()
    }
    if config.is_grammar:
        made_from["data"] = data_source(config)
        wanted |= data_hashes(before, made_from["data"])
    check_files(root, before, wanted, keep)
    if writes:
        with writing(root):
            if fresh:
                remove(root, before, PHASES, keep)
            record_files(root, before, wanted, made_from, fresh)
        write_files(root, config, contents, wanted)
    return config, data_dir, tokenizer


def check_inputs(where: Path, found: Any, expected: dict[str, str]) -> None:
    """Refuse to continue from what was made of other data or another teacher."""
    changed = [name for name in expected if not found or found.get(name) != expected[name]]
    if changed:
        raise ConfigError(
            f"{where}: was made from another {' and '.join(changed)} than is given now; name the "
            "same data and teacher, or use another --output-dir"
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
    if config.is_grammar:
        return root / "data"
    if not config.data_dir and config.data.task in DATA:
        return DATA[config.data.task]
    if not config.data_dir:
        raise DataError(
            f"--data-dir is missing: preset {config.preset!r} reads "
            "{train,valid,test}.jsonl[.gz] with src and trg from it; name the folder"
        )
    return Path(config.data_dir)


def tokenizer_source(config: Config, data_dir: Path) -> dict[str, Any]:
    """All that a run's tokenizer is made from: settings, and the hash of the file that it reads."""
    if config.is_grammar:
        return {"task": config.data.task}
    values = to_dict(config.data)
    source = {key: values[key] for key in _TOKENIZER_KEYS if key in values}
    if config.data.vocab_file:
        # Its place does not matter, and its size is its own.
        file = find_vocabulary(config.data.vocab_file, data_dir)
        del source["vocab_file"], source["vocab_size"]
    else:
        file = find_split(data_dir, "train")
    try:
        return {**source, "sha256": hash_file(file)}
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the path") from error


def _saved_tokenizer(
    root: Path, before: RunRecord | None, source: dict[str, Any]
) -> TextTokenizer | None:
    """The run's tokenizer, if it has one that was made from this; None: it is to be made."""
    if before is None or not before.wrote(root, TOKENIZER_NAME):
        return None
    known = before.made_from.get(TOKENIZER_NAME)
    if known is None or known == source:
        return read_tokenizer(root / TOKENIZER_NAME)
    if has_trained(root):
        changed = [key for key in (*known, *source) if known.get(key) != source.get(key)]
        what = ", ".join(dict.fromkeys("text" if key == "sha256" else key for key in changed))
        raise ConfigError(
            f"{root / TOKENIZER_NAME}: was made from another {what} than is given now, and "
            "what the run has trained needs it; give the same, or use another --output-dir"
        )
    return None


def _start(config: Config, given: bool) -> Pretrained | None:
    """The encoder that a run's own teacher starts from; none where a teacher is given."""
    if given or not config.model.start_from:
        return None
    return read_pretrained(config.model.start_from)


def make_tokenizer(
    config: Config, data_dir: Path, start: Pretrained | None = None
) -> TextTokenizer:
    """The tokenizer that a configuration asks for, made anew; nothing is written.

    With a pretrained start it is that one's, pruned to what the training split uses.

    Raises:
        DataError, ModelFileError: the vocabulary or the rows to learn it on cannot be read.
        ConfigError: the vocabulary's case is not the configuration's.
    """
    data = config.data
    tokenizer: TextTokenizer
    if config.is_grammar:
        tokenizer = Tokenizer.from_words(grammar.vocabulary(data.task))
    elif start is not None:
        texts = _texts(find_split(data_dir, "train"))
        tokenizer = prune_vocabulary(start.tokenizer, texts, data.prune_below)
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
        if os.path.isfile(place):
            return place
    looked = ", ".join(str(place) for place in places)
    raise DataError(f"data.vocab_file {name!r} is not found (looked at {looked}); give its path")


def _texts(path: Path) -> Iterator[str]:
    for row in read_rows(path):
        yield row.src
        yield row.trg


def _check_same_run(root: Path, config: Config, record: RunRecord | None) -> None:
    """Refuse a folder whose configuration is another run's, or no run's."""
    file = root / CONFIG_NAME
    if not os.path.lexists(file):
        return
    try:
        before = from_dict(load_toml(file))
    except ConfigError as error:
        reason = str(error).removeprefix(f"--config {file}: ")
        raise ConfigError(
            f"{file}: is not a configuration that a run of this version wrote ({reason}); use "
            "another --output-dir, or move it away"
        ) from error
    if record is None and file.read_bytes() != to_toml(before).encode():
        raise ConfigError(
            f"{file}: was not written by a run, and a run writes its configuration there; use "
            "another --output-dir, or move it away"
        )
    changed = same_run(before, config, _FREE_KEYS)
    if changed:
        raise ConfigError(
            f"{root} holds a run with another configuration ({'; '.join(changed[:5])}); use "
            "another --output-dir, or give the same values"
        )
