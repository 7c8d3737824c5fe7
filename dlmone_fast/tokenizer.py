"""BERT's WordPiece, safe for text from users, and DiffuSeq's way back from ids to text.

A tokenizer here is a vocabulary plus the lower-casing rule; everything else is fixed. A
`tokenizer.json` is therefore read for these parts alone and the rest is built anew, so that a
hostile file cannot bring its own normaliser, splitter or added tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dlmone_fast.arguments import refuse_one
from dlmone_fast.boundaries import ALONE, BLANK
from dlmone_fast.checks import is_whole
from dlmone_fast.errors import ModelFileError, UsageError
from dlmone_fast.text_tokenizer import (
    DEFAULT_MAX_CHARS,
    MAX_VOCAB_SIZE,
    SPECIAL_TOKENS,
    TextTokenizer,
    is_torn,
    named,
    parsed_json,
    read_text,
    unicode_text,
)
from dlmone_fast.wordpiece import MAX_WORD_CHARS, PREFIX, learn_pieces

_ANOTHER = "give the file of a BERT-style WordPiece tokenizer"

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


class Tokenizer(TextTokenizer):
    """WordPiece over a fixed vocabulary; ids are positions in `vocabulary`.

    `max_chars` caps a text before it is tokenised: the cost of tokenising grows with the
    text even where the ids are cut afterwards (measured: 10 s for a 10 MB prompt).
    """

    kind = "wordpiece"

    def __init__(
        self,
        vocabulary: Sequence[str],
        *,
        lowercase: bool = True,
        strip_accents: bool | None = None,
        max_chars: int = DEFAULT_MAX_CHARS,
    ) -> None:
        """Raise ModelFileError for a vocabulary that lacks a special token or repeats one."""
        super().__init__(vocabulary, max_chars)
        self.lowercase = lowercase
        self.strip_accents = strip_accents
        self._backend = _backend(self._ids, lowercase, strip_accents)
        self._respelling = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
        self._encode_batch = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)
        self.hash = self._hash()

    @classmethod
    def from_vocab_file(
        cls, path: str | Path, lowercase: bool = True, strip_accents: bool | None = None
    ) -> Tokenizer:
        """Read BERT's `vocab.txt`: one token a line, the line's number (from 0) its id.

        `strip_accents` None: where text is lower-cased, as BERT's uncased models were trained.
        """
        text = read_text(Path(path))
        if _is_json_object(text):
            raise ModelFileError(
                f"{path}: is JSON, as a tokenizer.json is; expected a vocab.txt with one token a "
                "line: give that file, or write the keys of model.vocab in order of their ids"
            )
        tokens = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
        build = partial(cls, tokens, lowercase=lowercase, strip_accents=strip_accents)
        return named(Path(path), build)

    @classmethod
    def from_file(cls, path: str | Path, sha256: str = "") -> Tokenizer:
        """Read a `tokenizer.json`, written by `save` or by another tool for a BERT model.

        With `sha256`, what is read must have that hash, in hex: a manifest's, verified earlier.
        """
        text = read_text(Path(path), sha256)
        return named(Path(path), lambda: cls.from_json(text))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Build from the text of a `tokenizer.json`; raise ModelFileError if it is not BERT's."""
        return cls.from_content(parsed_json(text))

    @classmethod
    def from_content(cls, content: object) -> Tokenizer:
        """Build from the parsed content of a `tokenizer.json`."""
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
    def learn(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        lowercase: bool = True,
        strip_accents: bool = False,
    ) -> Tokenizer:
        """Learn a vocabulary of at most `vocab_size` tokens; the same texts give the same one.

        Special tokens get ids 0..4. Texts are read once, in a stream. Accents stay unless
        `strip_accents` is set: what Unicode calls one are vowels in Hindi and voicing in Japanese.
        """
        smallest = 2 * len(SPECIAL_TOKENS)
        if not is_whole(vocab_size, smallest, MAX_VOCAB_SIZE):
            raise UsageError(
                f"vocab_size: expected {smallest} to {MAX_VOCAB_SIZE}, got {vocab_size!r}"
            )
        refuse_one("texts", texts)
        splitter = cls(SPECIAL_TOKENS, lowercase=lowercase, strip_accents=strip_accents)
        counts: Counter[str] = Counter()
        for index, text in enumerate(texts):
            counts.update(splitter._split(unicode_text(text, f"texts[{index}]")))
        if not counts:
            raise UsageError("texts: expected at least one word to learn from, got none")
        pieces = learn_pieces(counts, vocab_size - len(SPECIAL_TOKENS))
        return cls([*SPECIAL_TOKENS, *pieces], lowercase=lowercase, strip_accents=strip_accents)

    @property
    def is_cased(self) -> bool:
        """Whether a tenth of the words or more have capitals, as in a cased model's vocabulary.

        Names in brackets, as of special tokens, do not count.
        """
        words = [token for token in self.vocabulary if not token.startswith("[")]
        return 10 * sum(word != word.lower() for word in words) >= max(1, len(words))

    def encode(
        self, texts: Sequence[str], named: Callable[[int], str] = "texts[{}]".format
    ) -> list[list[int]]:
        """Return `[CLS] … [SEP]` ids of each text, in order and never truncated.

        No text yields a special token's id, except [UNK] for what the vocabulary lacks.
        Raise PromptError for a text that is not a str, not Unicode or over `max_chars`; it is
        called `named(place)`, as the caller knows it.
        """
        checked = self._checked_texts(texts, named)
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
        return not is_torn(text) and any(
            found > most for found in accumulate(map(self._count, _parts(text)))
        )

    def respell(self, text: str) -> str:
        """Return the text as `decode_clean` writes it where the vocabulary knows every word.

        Lower-cased as this tokenizer does it, words and punctuation spaced alike; no word becomes
        [UNK] and no accent is stripped. Raise PromptError as `encode` does.
        """
        normalised = self._respelling.normalize_str(self._checked(text, "text"))
        words = [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(normalised)]
        return _cleaned(self._backend.decoder.decode(words))

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`, in the `tokenizers` library's format."""
        return str(self._backend.to_str(pretty=True))

    def _text(self, ids: list[int]) -> str:
        return _cleaned(self._backend.decode(ids, skip_special_tokens=False))

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


def _cleaned(text: str) -> str:
    for spaced, joined in _CLEAN_UP:
        text = text.replace(spaced, joined)
    return text


def _parts(text: str) -> Iterator[str]:
    """The text in parts that end where a word surely does; none where there is but one."""
    start, size = 0, _FIRST_PART
    while start < len(text):
        boundary = _BOUNDARY.search(text, start + size)
        end = boundary.end() if boundary else len(text)
        if end - start < len(text):
            yield text[start:end]
        start, size = end, min(2 * size, _QUICK_CHARS)


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


def _is_json_object(text: str) -> bool:
    # No vocabulary begins so and is JSON to its end.
    if not text.lstrip().startswith("{"):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


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
