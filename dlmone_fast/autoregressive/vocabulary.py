"""Text to ids and back, for the two kinds of tokens that an autoregressive model reads and writes.

symbols     the source's characters; the target's symbols, which stand between blanks
wordpiece   the project's WordPiece on both sides
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dlmone_fast.errors import DataError, ModelFileError, PromptError
from dlmone_fast.models.plainfiles import dump_json, parse_json, read_bytes
from dlmone_fast.tokenizer import Tokenizer

SYMBOLS_NAME = "symbols.json"
TOKENIZER_NAME = "tokenizer.json"
_MARKS = ("<pad>", "<start>", "<end>")
_MAX_SYMBOLS = 100_000
_MAX_CHARS = 20_000
_MAX_FILE_BYTES = 16 << 20

Pair = tuple[list[int], list[int]]


class Vocabulary(ABC):
    """Ids of sources and targets. Every list of ids ends with `end_id`; targets begin with
    `start_id`."""

    kind: str
    file_name: str
    pad_id: int
    start_id: int
    end_id: int
    never: tuple[int, ...]
    """Ids of the target side that are never written."""
    shared: bool

    @property
    @abstractmethod
    def source_size(self) -> int:
        """Number of source ids."""

    @property
    @abstractmethod
    def target_size(self) -> int:
        """Number of target ids."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """Of everything that decides about ids."""

    @abstractmethod
    def sources(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of sources; raises PromptError that names the text and what is unknown in it."""

    @abstractmethod
    def reads(self, texts: Sequence[str]) -> list[bool]:
        """Whether the vocabulary knows everything in each of some sources."""

    @abstractmethod
    def pairs(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[Pair | None], int]:
        """Ids of pairs for training; None for one that cannot be spelled, and their number."""

    @abstractmethod
    def text(self, ids: Sequence[int]) -> str:
        """The text of target ids, marks left out."""

    @abstractmethod
    def normal(self, text: str) -> str:
        """A text of the target's side as a perfect model would write it."""

    @abstractmethod
    def normal_source(self, text: str) -> str:
        """The text of the target's side that copies this source; empty: there is none."""

    @abstractmethod
    def file_text(self) -> str:
        """The content of `file_name`."""


class Symbols(Vocabulary):
    """Characters in, symbols out; the two vocabularies have nothing in common but the marks."""

    kind = "symbols"
    file_name = SYMBOLS_NAME
    pad_id, start_id, end_id = range(3)
    never = (0, 1)
    shared = False

    def __init__(
        self, characters: Sequence[str], symbols: Sequence[str], lowercase: bool = True
    ) -> None:
        """Raise ModelFileError for entries that are empty, repeated, or no characters."""
        for name, entries in (("characters", characters), ("symbols", symbols)):
            _check_entries(name, entries)
        if any(len(entry) != 1 for entry in characters):
            raise ModelFileError("characters: expected single characters, got longer ones")
        if any(entry.split() != [entry] for entry in symbols):
            raise ModelFileError("symbols: expected words without white space")
        self.characters, self.symbols = tuple(characters), tuple(symbols)
        self.lowercase = lowercase
        first = len(_MARKS)
        self._source_ids = {entry: i for i, entry in enumerate(self.characters, first)}
        self._target_ids = {entry: i for i, entry in enumerate(self.symbols, first)}

    @classmethod
    def learn(cls, pairs: Iterable[tuple[str, str]], lowercase: bool = True) -> Symbols:
        """The characters and symbols of pairs of source and target, sorted."""
        characters: set[str] = set()
        symbols: set[str] = set()
        for source, target in pairs:
            characters.update(source.lower() if lowercase else source)
            symbols.update(target.split())
        return cls(sorted(characters), sorted(symbols), lowercase)

    @classmethod
    def from_json(cls, content: dict[str, Any], where: Path) -> Symbols:
        """The vocabulary that `file_text` wrote; raises ModelFileError."""
        kinds = {"characters": list, "symbols": list, "lowercase": bool}
        if set(content) != set(kinds) or any(
            type(content[name]) is not kind for name, kind in kinds.items()
        ):
            raise ModelFileError(
                f"{where}: expected characters and symbols (lists) and lowercase; copy it again"
            )
        try:
            return cls(content["characters"], content["symbols"], content["lowercase"])
        except ModelFileError as error:
            raise ModelFileError(f"{where}: {error}; copy the file again") from error

    @property
    def source_size(self) -> int:
        return len(_MARKS) + len(self.characters)

    @property
    def target_size(self) -> int:
        return len(_MARKS) + len(self.symbols)

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.file_text().encode()).hexdigest()

    def sources(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._source(text, f"texts[{i}]") for i, text in enumerate(texts)]

    def reads(self, texts: Sequence[str]) -> list[bool]:
        known = self._source_ids.keys()
        stripped = [text.strip() for text in texts]
        return [
            bool(text) and known >= set(text.lower() if self.lowercase else text)
            for text in stripped
        ]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[Pair | None], int]:
        encoded = [self._pair(source, target) for source, target in pairs]
        return encoded, encoded.count(None)

    def text(self, ids: Sequence[int]) -> str:
        first = len(_MARKS)
        return " ".join(self.symbols[i - first] for i in ids if i >= first)

    def normal(self, text: str) -> str:
        return " ".join(text.split())

    def normal_source(self, text: str) -> str:
        return ""

    def file_text(self) -> str:
        return dump_json(
            {
                "characters": list(self.characters),
                "symbols": list(self.symbols),
                "lowercase": self.lowercase,
            }
        )

    def _pair(self, source: str, target: str) -> Pair | None:
        source = source.lower() if self.lowercase else source
        symbols = target.split()
        if not (self._source_ids.keys() >= set(source) and self._target_ids.keys() >= set(symbols)):
            return None
        return (
            [*(self._source_ids[char] for char in source), self.end_id],
            [self.start_id, *(self._target_ids[symbol] for symbol in symbols), self.end_id],
        )

    def _source(self, text: str, name: str) -> list[int]:
        if not isinstance(text, str):
            raise PromptError(f"{name}: expected str, got {type(text).__name__}")
        if len(text) > _MAX_CHARS:
            raise PromptError(
                f"{name}: {len(text)} characters, the limit is {_MAX_CHARS}; shorten it"
            )
        text = text.strip()
        text = text.lower() if self.lowercase else text
        if not text:
            raise PromptError(f"{name}: is empty; give at least one character")
        unknown = [char for char in dict.fromkeys(text) if char not in self._source_ids]
        if unknown:
            shown = ", ".join(map(ascii, unknown[:5]))
            raise PromptError(
                f"{name}: {shown} is not among the {len(self.characters)} characters that the "
                "model knows; spell the text with those, or leave it out"
            )
        return [*(self._source_ids[char] for char in text), self.end_id]


class WordPiece(Vocabulary):
    """The project's WordPiece, one vocabulary for both sides."""

    kind = "wordpiece"
    file_name = TOKENIZER_NAME
    shared = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad_id, self.start_id = tokenizer.pad_id, tokenizer.cls_id
        self.end_id = tokenizer.sep_id
        self.never = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.mask_id)

    @property
    def source_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def target_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def hash(self) -> str:
        return self.tokenizer.hash

    def sources(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode(texts)

    def reads(self, texts: Sequence[str]) -> list[bool]:
        return [self.tokenizer.unk_id not in ids for ids in self.tokenizer.encode(texts)]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[Pair | None], int]:
        sources = self.tokenizer.encode([source for source, _ in pairs])
        targets = self.tokenizer.encode([target for _, target in pairs])
        return list(zip(sources, targets, strict=True)), 0

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode_clean(ids)

    def normal(self, text: str) -> str:
        return self.text(self.tokenizer.encode([text])[0])

    def normal_source(self, text: str) -> str:
        return self.normal(text)

    def file_text(self) -> str:
        return self.tokenizer.to_json()


def read_vocabulary(folder: Path, kind: str) -> Vocabulary:
    """The vocabulary of a folder whose manifest was checked."""
    if kind == WordPiece.kind:
        return WordPiece(Tokenizer.from_file(folder / TOKENIZER_NAME))
    content = read_bytes(folder, SYMBOLS_NAME, ModelFileError, _MAX_FILE_BYTES)
    where = folder / SYMBOLS_NAME
    return Symbols.from_json(parse_json(content, where, ModelFileError), where)


def learn_symbols(pairs: Sequence[tuple[str, str]], lowercase: bool) -> Symbols:
    """The vocabularies of a training split.

    Raises:
        DataError: they are too large to be characters and symbols.
    """
    learned = Symbols.learn(pairs, lowercase)
    if max(learned.source_size, learned.target_size) > _MAX_SYMBOLS:
        raise DataError(
            f"tokens = 'symbols': the training split has {len(learned.characters):,} characters "
            f"and {len(learned.symbols):,} symbols, at most {_MAX_SYMBOLS:,} are allowed; is this "
            "text? Use tokens = 'wordpiece'"
        )
    return learned


def _check_entries(name: str, entries: Sequence[str]) -> None:
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise ModelFileError(f"{name}: expected one or more non-empty strings")
    if len(set(entries)) != len(entries):
        raise ModelFileError(f"{name}: an entry stands there twice; keep one")
