"""Counts of a tokenizer's losses: letters that it does not give back, and tokens it writes [UNK].

Counted on the user's own rows by the round trip itself, decode(encode(text)): a vocabulary that
strips vowel signs, or lacks half of an alphabet, trains without any other sign of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dlmone_fast.data.rows import find_split, read_rows
from dlmone_fast.tokenizer import Tokenizer

_ROWS = 2048


@dataclass
class Fidelity:
    """Counts over the texts of a split, both sides of its rows.

    Letters are the characters that are not blank, in lower case where the tokenizer lower-cases; a
    letter is lost if the text has it more often than its round trip. Tokens leave out [CLS] and
    [SEP].
    """

    letters: int = 0
    lost: int = 0
    tokens: int = 0
    unknown: int = 0

    def add(
        self, tokenizer: Tokenizer, texts: Sequence[str], encoded: Sequence[Sequence[int]]
    ) -> None:
        """Count texts and the ids that `tokenizer.encode` made of them."""
        for text, ids in zip(texts, encoded, strict=True):
            unknown = list(ids).count(tokenizer.unk_id)
            given = _letters(text, tokenizer.lowercase)
            back = _letters(tokenizer.decode_clean(ids).replace("[UNK]", ""), False)
            self.letters += len(given)
            self.tokens += len(ids) - 2
            self.unknown += unknown
            if unknown or given != back:
                self.lost += (Counter(given) - Counter(back)).total()

    def line(self, split: str) -> str:
        """The counts in words, with the way out where something is lost."""
        told = (
            f"{split}: the tokenizer loses {self.lost:,} of {self.letters:,} letters "
            f"({_share(self.lost, self.letters)}) and writes {self.unknown:,} of {self.tokens:,} "
            f"tokens as [UNK] ({_share(self.unknown, self.tokens)})"
        )
        if self.unknown:
            return f"{told}; a larger data.vocab_size, or another data.vocab_file, knows more words"
        if self.lost:
            return f"{told}; data.strip_accents = off keeps accents and vowel signs"
        return told


def split_fidelity(data_dir: str | Path, split: str, tokenizer: Tokenizer) -> Fidelity:
    """Read a split and count what the tokenizer loses of it.

    Raises:
        DataError: the split is missing or malformed.
        PromptError: a text is longer than the tokenizer takes.
    """
    fidelity = Fidelity()
    texts = _texts(find_split(data_dir, split))
    while chunk := list(islice(texts, _ROWS)):
        fidelity.add(tokenizer, chunk, tokenizer.encode(chunk))
    return fidelity


def _texts(path: Path) -> Iterator[str]:
    for row in read_rows(path):
        yield row.src
        yield row.trg


def _letters(text: str, lowercase: bool) -> str:
    if lowercase:
        # Character by character as the tokenizer does it: Python's own rule for a whole text
        # writes the last sigma of a word in another way.
        text = "".join(map(str.lower, text)) if "Σ" in text else text.lower()
    return "".join(text.split())


def _share(part: int, whole: int) -> str:
    percent = 100 * part / whole if whole else 0.0
    # A small loss must not read as none.
    return "under 0.01 %" if part and percent < 0.01 else f"{percent:.2f} %"
