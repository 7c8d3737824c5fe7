"""A tokenizer of whatever kind, as the rest of the project knows it: ids of texts, texts of ids.

Ids are positions in a vocabulary that holds five special tokens. What texts may hold and how they
are split is the kind's own matter: see `dlmone_fast.tokenizer` and `dlmone_fast.aligned_tokenizer`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dlmone_fast.arguments import refuse_one
from dlmone_fast.checks import as_whole, is_whole
from dlmone_fast.errors import ModelFileError, PromptError, UsageError
from dlmone_fast.files import write_atomically
from dlmone_fast.textfiles import decoded

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DEFAULT_MAX_CHARS = 20_000
MAX_FILE_BYTES = 64 * 2**20
MAX_VOCAB_SIZE = 1_000_000

Built = TypeVar("Built")


class TextTokenizer(ABC):
    """Text ↔ ids over a fixed vocabulary.

    Attributes:
        kind: "wordpiece" or "aligned", as `data.tokenizer` names it.
        vocabulary: the tokens; an id is a place in it.
        max_chars: longest text in characters, checked before it is tokenised.
        hash: sha256 in hex of all that decides which ids a text has.
    """

    kind: ClassVar[str]
    hash: str

    def __init__(self, vocabulary: Sequence[str], max_chars: int = DEFAULT_MAX_CHARS) -> None:
        """Raise ModelFileError for a vocabulary that lacks a special token or repeats one."""
        if not is_whole(max_chars, 1, 2**31):
            raise UsageError(f"max_chars: expected 1 to {2**31}, got {max_chars!r}")
        refuse_one("vocabulary", vocabulary)
        self.vocabulary = tuple(vocabulary)
        self.max_chars = max_chars
        self._ids = _checked_vocabulary(self.vocabulary)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            self._ids[token] for token in SPECIAL_TOKENS
        )
        # [UNK] stays: it stands for a word of the text, as in DiffuSeq's own clean-up.
        self._silent_ids = frozenset((self.pad_id, self.cls_id, self.sep_id, self.mask_id))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def example(self) -> str:
        """A shortest text that `encode` reads: what a warm-up or a probe asks."""
        return ""

    @abstractmethod
    def encode(
        self, texts: Sequence[str], named: Callable[[int], str] = "texts[{}]".format
    ) -> list[list[int]]:
        """Return `[CLS] … [SEP]` ids of each text, in order and never truncated.

        Raise PromptError for a text that is not a str, not Unicode, over `max_chars`, or holds
        what this kind of tokenizer cannot read; it is called `named(place)`, as the caller knows
        it.
        """

    @abstractmethod
    def is_surely_longer(self, text: str, ids: int) -> bool:
        """Whether a text certainly has more ids than that, [CLS] and [SEP] included."""

    @abstractmethod
    def to_json(self) -> str:
        """Return the content of `tokenizer.json`."""

    @abstractmethod
    def _text(self, ids: list[int]) -> str:
        """The text of checked ids."""

    @abstractmethod
    def respell(self, text: str) -> str:
        """Return the text as `decode_clean` writes it where the vocabulary knows all of it.

        Raise PromptError as `encode` does, which calls it "text".
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text as DiffuSeq's decoding does: special tokens kept, trailing [PAD] cut.

        Raise UsageError for an id outside 0..vocab_size-1.
        """
        kept = self._checked_ids(ids)
        while kept and kept[-1] == self.pad_id:
            kept.pop()
        return self._text(kept)

    def decode_clean(self, ids: Sequence[int]) -> str:
        """Return the text up to the first [SEP] after an optional leading [CLS].

        [PAD], [CLS] and [MASK] are left out; [UNK] stays, it stands for a word.
        """
        kept = self._checked_ids(ids)
        if kept[:1] == [self.cls_id]:
            del kept[0]
        if self.sep_id in kept:
            del kept[kept.index(self.sep_id) :]
        return self._text([token for token in kept if token not in self._silent_ids])

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`; a failed write leaves an earlier file as it was."""
        try:
            write_atomically(Path(path), [self.to_json().encode()])
        except OSError as error:
            raise ModelFileError(
                f"{path}: cannot write the tokenizer ({error}); free space or choose a "
                "folder that you may write to"
            ) from error

    def _checked_texts(self, texts: Sequence[str], named: Callable[[int], str]) -> list[str]:
        refuse_one("texts", texts, PromptError)
        return [self._checked(text, named(i)) for i, text in enumerate(texts)]

    def _checked(self, text: str, name: str) -> str:
        # The length comes first: it costs nothing, whatever the text holds.
        if isinstance(text, str) and len(text) > self.max_chars:
            raise PromptError(
                f"{name}: {len(text)} characters, the limit is {self.max_chars}; shorten the "
                "text or raise the tokenizer's max_chars"
            )
        return unicode_text(text, name)

    def _checked_ids(self, ids: Sequence[int]) -> list[int]:
        checked = []
        for token in ids:
            number = as_whole(token)
            if number is None:
                raise UsageError(f"ids: expected a sequence of int, got {token!r:.80} in it")
            checked.append(number)
        if checked and not 0 <= min(checked) <= max(checked) < self.vocab_size:
            wrong = next(token for token in checked if not 0 <= token < self.vocab_size)
            raise UsageError(
                f"ids: {wrong} is outside the vocabulary (0 to {self.vocab_size - 1}); "
                "decode with the tokenizer that the model was trained with"
            )
        return checked


def unicode_text(text: str, name: str) -> str:
    """The text as a plain str; raise PromptError for what is none, or not Unicode."""
    if not isinstance(text, str):
        raise PromptError(f"{name}: expected str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name}: lone surrogate {text[error.start]!r} at character {error.start} is not "
            "Unicode text; decode the input as UTF-8 with errors='replace'"
        ) from error
    return str(text)


def is_torn(text: str) -> bool:
    """Whether a str holds a lone surrogate, and so is no Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def read_text(path: Path, sha256: str = "") -> str:
    """The content of a tokenizer's file; with `sha256`, of that hash, in hex.

    Raises:
        ModelFileError: it cannot be read, is too large, not UTF-8, or has another hash.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ModelFileError(
                f"{path}: has more than the {MAX_FILE_BYTES:,} bytes that a tokenizer may have; "
                "name a BERT tokenizer's file"
            )
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise ModelFileError(f"{path}: was changed while it was read; load it again")
        return decoded(content)
    except OSError as error:
        raise ModelFileError(
            f"{path}: cannot be read ({error.strerror}); check the path, or copy the file again"
        ) from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: not UTF-8 ({error}); copy the file again") from error


def parsed_json(text: str) -> Any:
    """The content of a `tokenizer.json`; raise ModelFileError where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"not JSON ({error}); copy the file again") from error


def named(path: Path, build: Callable[[], Built]) -> Built:
    """The result of `build`; its ModelFileError names the file."""
    try:
        return build()
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


def _checked_vocabulary(vocabulary: tuple[str, ...]) -> dict[str, int]:
    another = "give the file of a tokenizer that this project, or a BERT model, uses"
    if len(vocabulary) > MAX_VOCAB_SIZE:
        raise ModelFileError(f"{len(vocabulary)} tokens, the limit is {MAX_VOCAB_SIZE}; {another}")
    ids: dict[str, int] = {}
    for index, token in enumerate(vocabulary):
        if not isinstance(token, str) or not token or is_torn(token):
            raise ModelFileError(f"token {index}: expected text, got {token!r:.80}; {another}")
        if ids.setdefault(token, index) != index:
            raise ModelFileError(
                f"token {token!r:.80} stands at both {ids[token]} and {index}; remove one"
            )
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise ModelFileError(
            f"the vocabulary lacks {', '.join(missing)}; give the vocab.txt of a BERT-style "
            "WordPiece model"
        )
    return ids
