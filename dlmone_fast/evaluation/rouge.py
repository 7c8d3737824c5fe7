"""ROUGE-L as torchmetrics computes it with its defaults, the scorer DiffuSeq uses.

That scorer sees letters from a to z and digits alone. A reference in another script it would hold
against nothing, and identical texts would score 0: there the words are what stands between blanks,
as in BLEU. Of several references the best score counts. [UNK] counts in lengths and matches
nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

from dlmone_fast.evaluation.bleu import UNKNOWN, is_unknown

_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")

Tokenise = Callable[[str], list[str]]


def rouge_tokens(text: str) -> list[str]:
    """Lower-case, read everything outside [a-z0-9] as a space, split; no stemming."""
    first, *others = (_NOT_ALPHANUMERIC.sub(" ", p.lower()).split() for p in text.split(UNKNOWN))
    for words in others:
        first += [UNKNOWN, *words]
    return first


def words_between_blanks(text: str) -> list[str]:
    """Lower-case and split, for text that `rouge_tokens` does not see."""
    return [UNKNOWN if is_unknown(word) else word.lower() for word in text.split()]


def rouge_tokeniser(references: Sequence[str]) -> Tokenise:
    """`rouge_tokens`, or `words_between_blanks` where most letters of a row's references are of no
    Latin alphabet, or the original's tokeniser sees nothing in them."""
    text = "".join(references)
    letters = [] if text.isascii() else [char for char in text if char.isalpha()]
    foreign = 2 * sum(map(_is_latin, letters)) < len(letters)
    return (
        rouge_tokens if not foreign and any(map(rouge_tokens, references)) else words_between_blanks
    )


@lru_cache(maxsize=4096)
def _is_latin(char: str) -> bool:
    return unicodedata.name(char, "").startswith("LATIN ")


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence of two token lists, in which [UNK] has no part.

    Bit-parallel (Hyyro 2004): one word of len(first) bits holds a row of the dynamic
    programme, so a sentence pair costs len(second) integer operations.
    """
    positions: dict[str, int] = {}
    for place, token in enumerate(first):
        if token == UNKNOWN:
            continue
        positions[token] = positions.get(token, 0) | (1 << place)
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        hits = row & positions.get(token, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(first) - row.bit_count()


def rouge_l_of_tokens(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-L F1 of two `rouge_tokens` lists, in [0, 1]; 0 when either is empty."""
    common = longest_common_subsequence(reference, hypothesis)
    if common == 0:
        return 0.0
    precision, recall = common / len(hypothesis), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def rouge_l(hypothesis: str, *references: str) -> float:
    """ROUGE-L F1 of a text against its best reference, in [0, 1]; 0 where either has no token."""
    tokenise = rouge_tokeniser(references)
    words = tokenise(hypothesis)
    return max(rouge_l_of_tokens(words, tokenise(reference)) for reference in references)
