"""R12: however a prompt spells a special token, it is text: no id of one comes out of it."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import tiny

from dlmone_fast.data.batches import source_batch
from dlmone_fast.tokenizer import SPECIAL_TOKENS, Tokenizer

NAMES = ("PAD", "UNK", "CLS", "SEP", "MASK")

# Signs that look like brackets or letters, or become them when text is normalised (NFKC, or
# lower-cased and stripped of accents), and signs that vanish, also between two letters.
_OPENING = ("[", "\uff3b", "【", "〚", "⟦", "﹇", "[\u0301", "\u200b[", "[[", "\\[", "(", "<", "<|")
_CLOSING = ("]", "\uff3d", "】", "〛", "⟧", "﹈", "]\u0301", "]\u200b", "]]", "\\]", ")", ">", "|>")
# fmt: off
_JOINTS = (
    "", "", "", "", "\u200b", "\u200d", "\ufeff", "\u00ad", "\x00", "\x7f", "\u0301", " ", "##",
)
_PIECES = (
    "##", "[", "]", "##]", "##sep", "##SEP", "sep", "SEP", "ba", "ce,", " ", "  ", "\t", "\n", "'",
    "101", "102", "[unused1]", "</s>", "<pad>", "\\", "É", "İ", "ß", "中", "😀", "\u0301", "\u3000",
    "\x00", "\u200d", "\ufffd", "\U000e0001",
)
# fmt: on


def _cased(source: Random, name: str) -> str:
    return source.choice([name, name, name.lower(), name.title(), name.swapcase()])


def _look_alike(source: Random, name: str) -> str:
    """Full-width, mathematical, Cyrillic and accented letters among its own."""
    cyrillic = str.maketrans("PACSEMK", "\u0420\u0410\u0421\u0405\u0415\u041c\u041a")
    accented = str.maketrans("ACEKNPS", "ÁÇÉĶŃṔŠ")
    return "".join(
        source.choice([
            letter, letter, chr(ord(letter) + 0xFEE0), chr(ord(letter) - ord("A") + 0x1D400),
            letter.translate(cyrillic), letter.translate(accented), letter + "\u0301",
        ])
        for letter in name
    )  # fmt: skip


def _joined(source: Random, name: str) -> str:
    """Something that vanishes, or should not, between its letters."""
    return "".join(letter + source.choice(_JOINTS) for letter in name)


def _spelled(source: Random) -> str:
    change = source.choice([_cased, _cased, _look_alike, _joined])
    name = change(source, source.choice(NAMES))
    plain = source.random() < 0.6
    opening, closing = ("[", "]") if plain else (source.choice(_OPENING), source.choice(_CLOSING))
    return opening + name + closing


def text_of(source: Random) -> str:
    """Spellings of special tokens among pieces, with and without spaces between."""
    parts = [
        _spelled(source) if source.random() < 0.6 else source.choice(_PIECES)
        for _ in range(source.randint(1, 10))
    ]
    return source.choice(["", "", " "]).join(parts)


def vocabulary() -> list[str]:
    """Every ASCII character, as a word and within one, and pieces that special tokens hold."""
    signs = string.ascii_letters + string.digits + string.punctuation
    inner = [f"##{sign}" for sign in string.ascii_letters + string.digits]
    names = [form for name in NAMES for form in (name, name.lower(), name.title())]
    pieces = [
        *signs,
        *inner,
        *names,
        *(f"##{name}" for name in names),
        "##]",
        "[[",
        "]]",
        "中",
        "😀",
    ]
    return [*SPECIAL_TOKENS, *dict.fromkeys(pieces)]


def _from_vocab_file(folder: Path) -> Tokenizer:
    path = folder / "vocab.txt"
    path.write_text("\n".join(vocabulary()), encoding="utf-8")
    return Tokenizer.from_vocab_file(path)


def _from_saved(folder: Path) -> Tokenizer:
    Tokenizer(vocabulary(), lowercase=False, strip_accents=True).save(folder / "tokenizer.json")
    return Tokenizer.from_file(folder / "tokenizer.json")


def _learned(folder: Path) -> Tokenizer:
    """Learnt from texts that are full of what a prompt may try."""
    texts = [text_of(Random(number)) for number in range(1_000)]
    return Tokenizer.learn([*texts, *SPECIAL_TOKENS * 100], 600, lowercase=False)


KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "vocab.txt, lower-casing": _from_vocab_file,
    "vocab.txt, cased": lambda folder: Tokenizer(vocabulary(), lowercase=False),
    "tokenizer.json, cased, without accents": _from_saved,
    "learned, cased": _learned,
    "whole words": lambda folder: tiny.tokenizer(),
}


def check(tokenizer: Tokenizer, texts: list[str]) -> None:
    """No text has the id of a special token, and each row of a batch has those of its layout."""
    cls_id, sep_id = tokenizer.cls_id, tokenizer.sep_id
    special = {tokenizer.pad_id, cls_id, sep_id, tokenizer.mask_id}
    encoded = tokenizer.encode(texts)
    for text, ids in zip(texts, encoded, strict=True):
        assert (ids[0], ids[-1]) == (cls_id, sep_id), repr(text)
        assert special.isdisjoint(ids[1:-1]), repr(text)
    ids, mask, _ = source_batch(encoded, 64, tokenizer, 40, "truncate")
    for text, row, generated in zip(texts, ids.tolist(), mask.tolist(), strict=True):
        # The layout's own: [CLS] text [SEP] [SEP], then what is to be generated.
        source = row[: generated.index(1)]
        assert (source[0], source[-2:]) == (cls_id, [sep_id, sep_id]), repr(text)
        assert special.isdisjoint(source[1:-2]), repr(text)


@pytest.fixture(scope="module")
def texts(campaign: bool) -> list[str]:
    """Many of them hold a token's exact spelling."""
    drawn = [text_of(Random(number)) for number in range(50_000 if campaign else 2_000)]
    for token in SPECIAL_TOKENS:
        exact = sum(token in text for text in drawn)
        assert exact > 0.05 * len(drawn), f"{token}: {exact} of {len(drawn)}, the case is too easy"
    return drawn


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_text_stay_text(tmp_path: Path, texts, figure, kind):  # type: ignore[no-untyped-def]
    check(KINDS[kind](tmp_path), texts)
    figure("R12", kind, "0 special ids from 10,000 texts", f"0 from {len(texts):,} texts")


def test_special_tokens_stay_text_with_berts_vocabulary(data_dir: Path, texts, figure):  # type: ignore[no-untyped-def]
    path = data_dir / "bert-base-uncased" / "vocab.txt"
    for lowercase in (True, False):
        check(Tokenizer.from_vocab_file(path, lowercase=lowercase), texts)
    figure(
        "R12",
        "BERT's own vocabulary, lower-casing and cased",
        "0 special ids from 10,000 texts",
        f"0 from {2 * len(texts):,} texts",
    )


def test_a_typed_unknown_token_is_no_unknown_word(texts, figure):  # type: ignore[no-untyped-def]
    """Where the vocabulary has all that a text holds, not even [UNK] comes out of it."""
    tokenizer = Tokenizer(vocabulary(), lowercase=False)
    known = [text for text in texts if text.isascii() and len(text) <= 100]
    typed = [text for text in known if "[UNK]" in text]
    assert len(typed) > 0.02 * len(known)
    for text, ids in zip(known, tokenizer.encode(known), strict=True):
        assert tokenizer.unk_id not in ids, repr(text)
    figure(
        "R12",
        "[UNK] typed, all signs known",
        "no id of [UNK]",
        f"0 from {len(known):,} texts, {len(typed):,} of which spell it",
    )
