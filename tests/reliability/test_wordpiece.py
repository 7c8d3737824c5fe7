"""R13: texts become the ids that the tokenizers library's own BERT tokenizer makes of them.

What encodes here is that library's WordPiece, put together anew from a vocabulary; decoding is held
against its definition.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from figures import Figure
from tokenizers import BertWordPieceTokenizer

from dlmone_fast.tokenizer import SPECIAL_TOKENS, Tokenizer

CHUNK = 20_000
_LETTERS = "etaoinshrdlu"
_ALPHABETS = (
    _LETTERS, _LETTERS, _LETTERS.upper() + _LETTERS, _LETTERS + "' .,?!n'tms've#", "0123456789.,-",
    "éèüñçßøİı\u0301\u0308\u0327", "абвгдежзиЙЁ", "αβγδΩς", "中文字漢𠀀", "한국어각", "かなカナ",
    "عربي\u064b؟", "हिन्दी।", "עברית־", "ไทย", "😀👩\u200d👧🏽", "\u2018\u2019\u201c\u201d—…«»¿",
    "\t\n\r\x00\x7f\u00a0\u2003\u200b\ufeff\ufffd",
)  # fmt: skip
_CLEAN_UP = {
    " .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m", " 's": "'s",
    " 've": "'ve", " 're": "'re",
}  # fmt: skip


def text_of(source: Random) -> str:
    """Some words, each of one script or of any characters at all."""
    words = []
    for _ in range(source.randint(1, 4)):
        if source.random() < 0.1:
            # Planes with characters, below and above the surrogates.
            places = [source.randrange(0xD800), source.randrange(0xE000, 0x20000)]
            words.append("".join(map(chr, places)))
        else:
            words.append("".join(source.choices(source.choice(_ALPHABETS), k=source.randint(1, 7))))
    return " ".join(words)


def decoded(vocabulary: Sequence[str], ids: Sequence[int]) -> str:
    """The definition: pieces joined, and spaces cleaned up."""
    text = " ".join(vocabulary[i] for i in ids).replace(" ##", "")
    for spaced, joined in _CLEAN_UP.items():
        text = text.replace(spaced, joined)
    return text


def differences(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Texts whose ids, or what is decoded of them, are others than the library's."""
    library = BertWordPieceTokenizer(
        {token: number for number, token in enumerate(tokenizer.vocabulary)},
        lowercase=tokenizer.lowercase, strip_accents=tokenizer.strip_accents,
    )  # fmt: skip
    # A special token that is spelled out is text here, and a token to the library.
    kept = [text for text in texts if not any(token in text for token in SPECIAL_TOKENS)]
    found = tokenizer.encode(kept)
    expected = [encoding.ids for encoding in library.encode_batch(kept)]
    return [
        text
        for text, ids, wanted in zip(kept, found, expected, strict=True)
        if ids != wanted or tokenizer.decode(ids) != decoded(tokenizer.vocabulary, wanted)
    ]


def rows_of(folder: Path) -> Iterator[str]:
    """Both texts of every pair."""
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield from json.loads(line).values()


def test_generated_texts_become_the_same_ids(campaign: bool, figure: Figure) -> None:
    count = 1_000_000 if campaign else CHUNK
    known = [text_of(Random(-number)) for number in range(1, 5_001)]
    tokenizers = [Tokenizer.learn(known, 3_000, lowercase=lowercase) for lowercase in (True, False)]
    for start in range(0, count, CHUNK):
        texts = [text_of(Random(number)) for number in range(start, start + CHUNK)]
        tokenizer = tokenizers[start // CHUNK % 2]
        assert differences(tokenizer, texts) == []
    figure(
        "R13", "generated texts of many scripts, vocabularies learnt from such",
        f"encoded and decoded as the tokenizers library does: 0 differences in {count:,} texts",
        f"0 in {count:,}",
    )  # fmt: skip


def test_the_paper_s_texts_become_the_same_ids(
    campaign: bool, figure: Figure, data_dir: Path
) -> None:
    tokenizer = Tokenizer.from_vocab_file(data_dir / "bert-base-uncased" / "vocab.txt")
    texts = list(islice(rows_of(data_dir / "qqp"), None if campaign else CHUNK))
    for start in range(0, len(texts), CHUNK):
        assert differences(tokenizer, texts[start : start + CHUNK]) == []
    figure(
        "R13", "pairs of QQP, BERT's vocabulary",
        "encoded and decoded as the tokenizers library does: 0 differences",
        f"0 in {len(texts):,} texts",
    )  # fmt: skip


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the cat's tail .", "another"]
    tokenizer = Tokenizer.learn(texts, 100)
    assert differences(tokenizer, texts) == []
    monkeypatch.setattr(tokenizer, "encode", lambda given: [[2, 3]] * len(given))
    assert differences(tokenizer, texts) == texts
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "another")
    assert differences(tokenizer, texts) == texts
