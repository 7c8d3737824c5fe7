"""BERT's WordPiece, safe for text from users, and DiffuSeq's way back from ids to text.

A tokenizer here is a vocabulary plus the lower-casing rule; everything else is fixed. A
`tokenizer.json` is therefore read for these parts alone and the rest is built anew, so that a
hostile file cannot bring its own normaliser, splitter or added tokens.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dlmone_fast.arguments import refuse_one
from dlmone_fast.boundaries import ALONE, BLANK
from dlmone_fast.errors import ModelFileError, PromptError, UsageError
from dlmone_fast.files import write_atomically
from dlmone_fast.wordpiece import MAX_WORD_CHARS, PREFIX, learn_pieces

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DEFAULT_MAX_CHARS = 20_000
_ANOTHER = "give the file of a BERT-style WordPiece tokenizer"
MAX_FILE_BYTES = 64 * 2**20
MAX_VOCAB_SIZE = 1_000_000

# Tokenising as many characters takes a millisecond.
_QUICK_CHARS = 1000

# Each match holds a token at least, and no token lies in two: a character of its own, or a letter,
# digit or symbol, which never vanishes, with whatever follows it up to where the word surely ends.
_SURE_TOKEN = re.compile(
    rf"[{ALONE}]|(?:[^\W_]|[\u2190-\u2bff\U0001f000-\U0001faff])[^{BLANK}{ALONE}]*"
)
# A text cut behind one of these has the tokens of its parts.
_BOUNDARY = re.compile(rf"[{BLANK}{ALONE}]")
_FIRST_PART = 128

# The clean-up of tokenisation spaces that DiffuSeq's decoding applies, in this order
# (arXiv 2210.08933; the replacements of Hugging Face's `clean_up_tokenization_spaces`).
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Tokenizer:
    """WordPiece over a fixed vocabulary; ids are positions in `vocabulary`.

    `max_chars` caps a text before it is tokenised: the cost of tokenising grows with the
    text even where the ids are cut afterwards (measured: 10 s for a 10 MB prompt).
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        *,
        lowercase: bool = True,
        strip_accents: bool | None = None,
        max_chars: int = DEFAULT_MAX_CHARS,
    ) -> None:
        """Raise ModelFileError for a vocabulary that lacks a special token or repeats one."""
        if not isinstance(max_chars, int) or not 1 <= max_chars <= 2**31:
            raise UsageError(f"max_chars: expected 1 to {2**31}, got {max_chars!r}")
        refuse_one("vocabulary", vocabulary)
        self.vocabulary = tuple(vocabulary)
        self.lowercase = lowercase
        self.strip_accents = strip_accents
        self.max_chars = max_chars
        ids = _checked_vocabulary(self.vocabulary)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            ids[token] for token in SPECIAL_TOKENS
        )
        # [UNK] stays: it stands for a word of the text, as in the paper's own clean-up.
        self._silent_ids = frozenset((self.pad_id, self.cls_id, self.sep_id, self.mask_id))
        self._backend = _backend(ids, lowercase, strip_accents)
        self._encode_batch = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)
        self.hash = self._hash()

    @classmethod
    def from_vocab_file(cls, path: str | Path, lowercase: bool = True) -> Tokenizer:
        """Read BERT's `vocab.txt`: one token a line, the line's number (from 0) its id."""
        text = _read_text(Path(path))
        if _is_json_object(text):
            raise ModelFileError(
                f"{path}: is JSON, as a tokenizer.json is; expected a vocab.txt with one token a "
                "line: give that file, or write the keys of model.vocab in order of their ids"
            )
        tokens = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
        return _named(Path(path), lambda: cls(tokens, lowercase=lowercase))

    @classmethod
    def from_file(cls, path: str | Path, sha256: str = "") -> Tokenizer:
        """Read a `tokenizer.json`, written by `save` or by another tool for a BERT model.

        With `sha256`, what is read must have that hash, in hex: a manifest's, verified earlier.
        """
        text = _read_text(Path(path), sha256)
        return _named(Path(path), lambda: cls.from_json(text))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Build from the text of a `tokenizer.json`; raise ModelFileError if it is not BERT's."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"not JSON ({error}); copy the file again") from error
        vocabulary, lowercase, strip_accents = _bert_parts(content)
        return cls(vocabulary, lowercase=lowercase, strip_accents=strip_accents)

    @classmethod
    def from_words(cls, words: Iterable[str]) -> Tokenizer:
        """Build a word-level vocabulary: special tokens 0..4, then `words`, each one token."""
        refuse_one("words", words)
        tokenizer = cls([*SPECIAL_TOKENS, *words])
        for word in tokenizer.vocabulary[len(SPECIAL_TOKENS) :]:
            if tokenizer._split(word) != [word]:
                raise UsageError(
                    f"words: {word!r} is not one lower-case word to BERT's splitter; "
                    "give words without spaces, capitals or inner punctuation"
                )
        return tokenizer

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> Tokenizer:
        """Learn a vocabulary of at most `vocab_size` tokens; the same texts give the same one.

        Special tokens get ids 0..4. Texts are read once, in a stream.
        """
        smallest = 2 * len(SPECIAL_TOKENS)
        if not isinstance(vocab_size, int) or not smallest <= vocab_size <= MAX_VOCAB_SIZE:
            raise UsageError(
                f"vocab_size: expected {smallest} to {MAX_VOCAB_SIZE}, got {vocab_size!r}"
            )
        refuse_one("texts", texts)
        splitter = cls(SPECIAL_TOKENS, lowercase=lowercase)
        counts: Counter[str] = Counter()
        for index, text in enumerate(texts):
            counts.update(splitter._split(_unicode(text, f"texts[{index}]")))
        if not counts:
            raise UsageError("texts: expected at least one word to learn from, got none")
        pieces = learn_pieces(counts, vocab_size - len(SPECIAL_TOKENS))
        return cls([*SPECIAL_TOKENS, *pieces], lowercase=lowercase)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def encode(
        self, texts: Sequence[str], named: Callable[[int], str] = "texts[{}]".format
    ) -> list[list[int]]:
        """Return `[CLS] … [SEP]` ids of each text, in order and never truncated.

        No text yields a special token's id, except [UNK] for what the vocabulary lacks.
        Raise PromptError for a text that is not a str, not Unicode or over `max_chars`; it is
        called `named(place)`, as the caller knows it.
        """
        refuse_one("texts", texts, PromptError)
        checked = [self._checked(text, named(i)) for i, text in enumerate(texts)]
        return [encoding.ids for encoding in self._encode_batch(checked)]

    def is_surely_longer(self, text: str, ids: int) -> bool:
        """Whether a long text certainly has more ids than that, [CLS] and [SEP] included.

        It stops reading where that is certain: after microseconds, where `encode` takes tens of
        milliseconds.
        """
        if not _QUICK_CHARS < len(text) <= self.max_chars:
            return False
        most = max(0, ids - 2)
        if len(list(islice(_SURE_TOKEN.finditer(text), most + 1))) > most:
            return True
        # Few words of many pieces, or of characters that the count above does not know. One with a
        # lone surrogate is for `encode` to refuse.
        return not _torn(text) and any(
            found > most for found in accumulate(map(self._count, _parts(text)))
        )

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

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`, in the `tokenizers` library's format."""
        return str(self._backend.to_str(pretty=True))

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`; a failed write leaves an earlier file as it was."""
        try:
            write_atomically(Path(path), [self.to_json().encode()])
        except OSError as error:
            raise ModelFileError(
                f"{path}: cannot write the tokenizer ({error}); free space or choose a "
                "folder that you may write to"
            ) from error

    def _checked(self, text: str, name: str) -> str:
        # The length comes first: it costs nothing, whatever the text holds.
        if isinstance(text, str) and len(text) > self.max_chars:
            raise PromptError(
                f"{name}: {len(text)} characters, the limit is {self.max_chars}; shorten the "
                "text or raise the tokenizer's max_chars"
            )
        return _unicode(text, name)

    def _checked_ids(self, ids: Sequence[int]) -> list[int]:
        try:
            checked = [operator.index(token) for token in ids]
        except TypeError as error:
            raise UsageError(f"ids: expected a sequence of int ({error})") from error
        if checked and not 0 <= min(checked) <= max(checked) < self.vocab_size:
            wrong = next(token for token in checked if not 0 <= token < self.vocab_size)
            raise UsageError(
                f"ids: {wrong} is outside the vocabulary (0 to {self.vocab_size - 1}); "
                "decode with the tokenizer that the model was trained with"
            )
        return checked

    def _text(self, ids: list[int]) -> str:
        text = str(self._backend.decode(ids, skip_special_tokens=False))
        for spaced, joined in _CLEAN_UP:
            text = text.replace(spaced, joined)
        return text

    def _split(self, text: str) -> list[str]:
        normalised = self._backend.normalizer.normalize_str(text)
        return [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(normalised)]

    def _count(self, text: str) -> int:
        return len(self._backend.encode(text, add_special_tokens=False).ids)

    def _hash(self) -> str:
        canonical = {
            "model": "WordPiece",
            "lowercase": self.lowercase,
            "strip_accents": self.strip_accents,
            "vocabulary": self.vocabulary,
        }
        text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _parts(text: str) -> Iterator[str]:
    """The text in parts that end where a word surely does; none where there is but one."""
    start, size = 0, _FIRST_PART
    while start < len(text):
        boundary = _BOUNDARY.search(text, start + size)
        end = boundary.end() if boundary else len(text)
        if end - start < len(text):
            yield text[start:end]
        start, size = end, min(2 * size, _QUICK_CHARS)


def _unicode(text: str, name: str) -> str:
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


def _checked_vocabulary(vocabulary: tuple[str, ...]) -> dict[str, int]:
    if len(vocabulary) > MAX_VOCAB_SIZE:
        raise ModelFileError(f"{len(vocabulary)} tokens, the limit is {MAX_VOCAB_SIZE}; {_ANOTHER}")
    ids: dict[str, int] = {}
    for index, token in enumerate(vocabulary):
        if not isinstance(token, str) or not token or _torn(token):
            raise ModelFileError(f"token {index}: expected text, got {token!r:.80}; {_ANOTHER}")
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


def _torn(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _backend(
    ids: dict[str, int], lowercase: bool, strip_accents: bool | None
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.WordPiece(
            ids,
            unk_token="[UNK]",
            continuing_subword_prefix=PREFIX,
            max_input_chars_per_word=MAX_WORD_CHARS,
        )
    )
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    backend.decoder = decoders.WordPiece(prefix=PREFIX)
    # Other tools expect the special tokens registered in tokenizer.json; without the switch
    # below a user's "[SEP]" would then become the real one and break the layout.
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.encode_special_tokens = True
    return backend


def _read_text(path: Path, sha256: str = "") -> str:
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
        return content.decode("utf-8")
    except OSError as error:
        raise ModelFileError(
            f"{path}: cannot be read ({error.strerror}); check the path, or copy the file again"
        ) from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: not UTF-8 ({error}); copy the file again") from error


def _is_json_object(text: str) -> bool:
    # No vocabulary begins so and is JSON to its end.
    if not text.lstrip("\ufeff \t\r\n").startswith("{"):
        return False
    try:
        json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return False
    return True


def _named(path: Path, build: Callable[[], Tokenizer]) -> Tokenizer:
    try:
        return build()
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


def _bert_parts(content: object) -> tuple[list[str], bool, bool | None]:
    """Return vocabulary in id order, lowercase and strip_accents of a tokenizer.json."""
    model = _section(content, "model", "WordPiece")
    normaliser = _section(content, "normalizer", "BertNormalizer")
    _section(content, "pre_tokenizer", "BertPreTokenizer")
    expected = {"unk_token": "[UNK]", "continuing_subword_prefix": PREFIX}
    for key, value in expected.items():
        if model.get(key, value) != value:
            raise ModelFileError(
                f"model.{key}: expected {value!r}, got {model[key]!r:.80}; {_ANOTHER}"
            )
    for key in ("clean_text", "handle_chinese_chars"):
        if normaliser.get(key, True) is not True:
            raise ModelFileError(
                f"normalizer.{key}: expected true, got {normaliser[key]!r:.80}; {_ANOTHER}"
            )
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or sorted(
        id_ for id_ in vocab.values() if type(id_) is int
    ) != list(range(len(vocab))):
        raise ModelFileError(
            f"model.vocab: expected each token with an id, 0, 1, 2, … each once; {_ANOTHER}"
        )
    lowercase = normaliser.get("lowercase", True)
    strip_accents = normaliser.get("strip_accents")
    if not isinstance(lowercase, bool) or not isinstance(strip_accents, (bool, type(None))):
        raise ModelFileError(
            f"normalizer: lowercase and strip_accents must be true or false; {_ANOTHER}"
        )
    return sorted(vocab, key=vocab.__getitem__), lowercase, strip_accents


def _section(content: object, key: str, kind: str) -> dict[str, Any]:
    section = content.get(key) if isinstance(content, dict) else None
    if not isinstance(section, dict) or section.get("type", kind) != kind:
        found = section.get("type") if isinstance(section, dict) else section
        raise ModelFileError(
            f"{key}: expected type {kind}, got {str(found)[:60]!r}; only BERT-style WordPiece "
            "tokenizers can be used"
        )
    return section
