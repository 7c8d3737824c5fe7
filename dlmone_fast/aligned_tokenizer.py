"""A tokenizer of words whose targets are aligned to them letter by letter.

A source is one word, one id a letter. A target has one label a letter (`dlmone_fast.alignment`):
no symbol, one, or two. Source and target therefore have the same length and stand side by side,
and a network that predicts each label reads the letter that it belongs to. Users see the plain
symbols: blanks are dropped and pairs are split.

The vocabulary: special tokens 0..4, the letters, then the labels, written /p/ so that a symbol b
and a letter b are two tokens.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlmone_fast.alignment import (
    BLANK_LABEL,
    JOIN,
    MAX_CELLS,
    Alignment,
    check_costs,
    is_symbol,
    label_symbols,
    learn_alignment,
    split_symbols,
)
from dlmone_fast.errors import ModelFileError, PromptError, UsageError
from dlmone_fast.text_tokenizer import (
    DEFAULT_MAX_CHARS,
    SPECIAL_TOKENS,
    TextTokenizer,
    is_torn,
    named,
    parsed_json,
    read_text,
)
from dlmone_fast.tokenizer import Tokenizer

FILE_TYPE = "aligned"
FILE_VERSION = 1
OUTPUT_CASES = ("same", "upper")

_FIRST_LETTER = len(SPECIAL_TOKENS)
_SHOWN_LETTERS = 60
_AGAIN = "copy the file again from its source"


class AlignedTokenizer(TextTokenizer):
    """Letters of a word, and labels aligned to them.

    Attributes:
        alignment: the learned costs; its letters and labels are the vocabulary's.
        output_case: "upper" shows symbols in capitals ("JH IY"), "same" as they were learned.
    """

    kind = "aligned"

    def __init__(
        self,
        alignment: Alignment,
        *,
        output_case: str = "same",
        max_chars: int = DEFAULT_MAX_CHARS,
    ) -> None:
        """Raise UsageError for an output case that there is not."""
        if output_case not in OUTPUT_CASES:
            raise UsageError(
                f"output_case: expected one of {', '.join(OUTPUT_CASES)}, got {output_case!r:.80}"
            )
        tokens = (f"/{label}/" for label in alignment.labels)
        super().__init__([*SPECIAL_TOKENS, *alignment.letters, *tokens], max_chars)
        self.alignment, self.output_case = alignment, output_case
        self._first_label = _FIRST_LETTER + len(alignment.letters)
        self._letter_ids = {x: _FIRST_LETTER + i for i, x in enumerate(alignment.letters)}
        self._label_ids = {x: self._first_label + i for i, x in enumerate(alignment.labels)}
        self._shown: list[tuple[str, ...]] = [(x,) for x in self.vocabulary[: self._first_label]]
        self._shown += [tuple(map(self._cased, label_symbols(x))) for x in alignment.labels]
        self.hash = hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def learn(
        cls, pairs: Iterable[tuple[str, str]], *, output_case: str = "same"
    ) -> AlignedTokenizer:
        """Learn letters, labels and their costs from words and their symbols.

        Args:
            pairs: a word, lower-cased here, and its symbols, separated by spaces.
            output_case: see the class.

        Raises:
            DataError: no pair can be aligned, or a symbol is written as labels are.
        """
        lowered = ((_lowered(source), target) for source, target in pairs)
        return cls(learn_alignment(lowered), output_case=output_case)

    @classmethod
    def from_file(cls, path: str | Path, sha256: str = "") -> AlignedTokenizer:
        """Read what `save` wrote; with `sha256`, of that hash, in hex."""
        text = read_text(Path(path), sha256)
        return named(Path(path), lambda: cls.from_json(text))

    @classmethod
    def from_json(cls, text: str) -> AlignedTokenizer:
        """Build from the text of a `tokenizer.json`; raise ModelFileError if it is no such file."""
        return cls.from_content(parsed_json(text))

    @classmethod
    def from_content(cls, content: object) -> AlignedTokenizer:
        """Build from the parsed content of a `tokenizer.json`, all of which is checked."""
        if not isinstance(content, dict) or content.get("type") != FILE_TYPE:
            raise ModelFileError(f"type: expected {FILE_TYPE!r}; name an aligned tokenizer's file")
        version = content.get("version")
        if type(version) is not int or version != FILE_VERSION:
            raise ModelFileError(
                f"version: expected {FILE_VERSION}, got {version!r:.40}; use the version of this "
                "project that wrote it"
            )
        case = content.get("output_case")
        if case not in OUTPUT_CASES:
            raise ModelFileError(
                f"output_case: expected one of {', '.join(OUTPUT_CASES)}, got {case!r:.40}; "
                f"{_AGAIN}"
            )
        return cls(_alignment(content), output_case=str(case))

    @property
    def example(self) -> str:
        """A shortest word."""
        return self.alignment.letters[0]

    def encode(
        self, texts: Sequence[str], named: Callable[[int], str] = "texts[{}]".format
    ) -> list[list[int]]:
        """Return `[CLS] letters [SEP]` of each word, lower-cased, without white space around it.

        Raise PromptError for a text that is empty, holds what is none of the letters, is not a
        str, not Unicode or over `max_chars`; it is called `named(place)`, as the caller knows it.
        """
        checked = self._checked_texts(texts, named)
        return [self._word(text, named(i)) for i, text in enumerate(checked)]

    def encode_targets(
        self, sources: Sequence[str], targets: Sequence[str]
    ) -> list[list[int] | None]:
        """Return `[CLS] labels [SEP]` of each target, as many labels as its source has letters.

        None where the pair cannot be aligned: a letter or symbol is unknown, or there are more
        symbols than the letters can hold.
        """
        pairs = [
            (_lowered(source), split_symbols(target))
            for source, target in zip(
                self._checked_texts(sources, "sources[{}]".format),
                self._checked_texts(targets, "targets[{}]".format),
                strict=True,
            )
        ]
        ids = self._label_ids
        return [
            None if labels is None else [self.cls_id, *(ids[x] for x in labels), self.sep_id]
            for labels in self.alignment.align_all(pairs)
        ]

    def is_surely_longer(self, text: str, ids: int) -> bool:
        """Whether a word has more ids than that, [CLS] and [SEP] included; one a letter."""
        return len(text) <= self.max_chars and len(_lowered(text)) > max(0, ids - 2)

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`."""
        content = {
            "type": FILE_TYPE,
            "version": FILE_VERSION,
            "output_case": self.output_case,
            "letters": self.alignment.letters,
            "labels": self.alignment.labels,
            "costs": self.alignment.costs,
        }
        return json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n"

    def _cased(self, symbol: str) -> str:
        return symbol.upper() if self.output_case == "upper" else symbol

    def _text(self, ids: list[int]) -> str:
        """Letters that follow each other are a word; symbols stand apart."""
        parts: list[str] = []
        in_word = False
        for token in ids:
            is_letter = _FIRST_LETTER <= token < self._first_label
            if is_letter and in_word:
                parts[-1] += self._shown[token][0]
            else:
                parts.extend(self._shown[token])
            in_word = is_letter
        return " ".join(parts)

    def respell(self, text: str) -> str:
        """Return the word in the letters that are read, lower-cased."""
        self.encode([text], "text".format)
        return _lowered(text)

    def _word(self, text: str, name: str) -> list[int]:
        word = _lowered(text)
        if not word:
            raise PromptError(
                f"{name}: empty; expected a word, written with the letters "
                f"{self._alphabet()}: remove the row or write one"
            )
        ids = [self._letter_ids.get(letter, 0) for letter in word]
        if 0 in ids:
            at = ids.index(0)
            raise PromptError(
                f"{name}: {_character(word[at])}, character {at + 1} of {word!r:.60}, is "
                f"none of the letters {self._alphabet()}; give one word a row, written with them, "
                "numbers and abbreviations in full"
            )
        return [self.cls_id, *ids, self.sep_id]

    def _alphabet(self) -> str:
        letters = "".join(self.alignment.letters)
        return letters if len(letters) <= _SHOWN_LETTERS else f"{letters[:_SHOWN_LETTERS]}…"


def read_tokenizer(path: str | Path, sha256: str = "") -> TextTokenizer:
    """Read a `tokenizer.json` of either kind: aligned, or a BERT-style WordPiece.

    With `sha256`, what is read must have that hash, in hex: a manifest's, verified earlier.

    Raises:
        ModelFileError: it cannot be read, or is neither.
    """
    path = Path(path)
    text = read_text(path, sha256)

    def built() -> TextTokenizer:
        content = parsed_json(text)
        if isinstance(content, dict) and content.get("type") == FILE_TYPE:
            return AlignedTokenizer.from_content(content)
        return Tokenizer.from_content(content)

    return named(path, built)


def _lowered(word: str) -> str:
    return word.strip().lower()


def _character(character: str) -> str:
    name = unicodedata.name(character, "").lower() or f"U+{ord(character):04X}"
    return f"{character!r} ({name})"


def _alignment(content: Mapping[str, Any]) -> Alignment:
    letters, labels = _strings(content, "letters"), _strings(content, "labels")
    for letter in letters:
        if len(letter) != 1 or letter.lower() != letter:
            raise ModelFileError(
                f"letters: expected one lower-case character each, got {letter!r:.40}; {_AGAIN}"
            )
    for label in labels:
        parts = label_symbols(label)
        if len(parts) > 2 or not all(map(is_symbol, parts)):
            raise ModelFileError(
                f"labels: expected {BLANK_LABEL!r}, a symbol, or two joined by {JOIN!r}, got "
                f"{label!r:.40}; {_AGAIN}"
            )
    if len(letters) * (len(labels) + 1) > MAX_CELLS:
        raise ModelFileError(
            f"{len(letters)} letters and {len(labels)} labels, the limit is {MAX_CELLS} pairs of "
            f"them; {_AGAIN}"
        )
    return Alignment(letters, labels, _costs(content, frozenset(letters), frozenset(labels)))


def _strings(content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = content.get(key)
    if not isinstance(values, list) or not values:
        raise ModelFileError(f"{key}: expected a list of strings, got {values!r:.40}; {_AGAIN}")
    for value in values:
        if not isinstance(value, str) or not value or is_torn(value):
            raise ModelFileError(f"{key}: expected strings, got {value!r:.40} in it; {_AGAIN}")
    if len(set(values)) != len(values):
        twice = Counter(values).most_common(1)[0][0]
        raise ModelFileError(f"{key}: {twice!r:.40} stands there twice; {_AGAIN}")
    return tuple(values)


def _costs(
    content: Mapping[str, Any], letters: frozenset[str], labels: frozenset[str]
) -> dict[str, dict[str, int]]:
    costs = content.get("costs")
    if not isinstance(costs, dict):
        raise ModelFileError(f"costs: expected an object, got {costs!r:.40}; {_AGAIN}")
    for letter, of_letter in costs.items():
        known = letter in letters and isinstance(of_letter, dict) and labels >= of_letter.keys()
        if not known:
            raise ModelFileError(
                f"costs: expected a letter of `letters` with an object of its labels' costs, got "
                f"{letter!r:.40}: {of_letter!r:.40}; {_AGAIN}"
            )
    try:
        check_costs(costs)
    except ValueError as error:
        raise ModelFileError(f"costs: {error}; {_AGAIN}") from error
    return costs
