"""Sentence BLEU as DiffuSeq reports it: NLTK >= 3.7, smoothing method 4, whitespace tokens.

Uniform weights over 1- to 4-grams, the usual brevity penalty; of several references a text is held
against the n-grams of all, and the length nearest to its own (Papineni et al., ACL 2002, as in
NLTK). Smoothing is method 4 of Chen and Cherry (WMT 2014) in the form NLTK has carried since 3.7;
older NLTK releases give other numbers for the same text.

[UNK] stands for any word that a vocabulary lacks, so that two of them are not known to be the same
word: it counts in lengths and matches nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

MAX_ORDER = 4
_SMOOTHING_K = 5
UNKNOWN = "[UNK]"
Ngram = tuple[str, ...]
# The reference of a row, or its references, one at least.
Reference = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class NgramProfile:
    """Everything BLEU needs of one sentence, so that n^2 comparisons count n-grams once.

    `kinds[i]` is the set of (i+1)-grams; `repeated[i]` holds the counts of those that occur
    more than once, which is rare, so that most of a comparison is one set intersection.
    """

    length: int
    kinds: tuple[frozenset[Ngram], ...]
    repeated: tuple[dict[Ngram, int], ...]


def ngrams(tokens: Sequence[str], order: int) -> Iterator[Ngram]:
    """The n-grams of `tokens` in reading order; none when there are fewer tokens than `order`."""
    return zip(*(tokens[start:] for start in range(order)), strict=False)


def references_of(reference: Reference) -> list[str]:
    """The references of a row as a list."""
    return [reference] if isinstance(reference, str) else list(reference)


def is_unknown(token: str) -> bool:
    """Whether a token is or holds [UNK]: decoding joins punctuation to it."""
    return UNKNOWN in token


def profile_tokens(tokens: Sequence[str]) -> NgramProfile:
    """Count the 1- to 4-grams of a tokenised sentence, those with [UNK] left out."""
    counts = [Counter(ngrams(tokens, order)) for order in range(1, MAX_ORDER + 1)]
    if any(map(is_unknown, tokens)):
        counts = [
            Counter({gram: n for gram, n in count.items() if not any(map(is_unknown, gram))})
            for count in counts
        ]
    return NgramProfile(
        len(tokens),
        tuple(frozenset(count) for count in counts),
        tuple(_repeated(count) for count in counts),
    )


def _repeated(count: Counter[Ngram]) -> dict[Ngram, int]:
    if count.total() == len(count):
        return {}
    return {ngram: times for ngram, times in count.items() if times > 1}


def merged_profile(profiles: Sequence[NgramProfile]) -> NgramProfile:
    """The n-grams of several references, each as often as in the one that has it most.

    Its `length` is the first one's: take `nearest_length` for a brevity penalty.
    """
    if len(profiles) == 1:
        return profiles[0]
    repeated: tuple[dict[Ngram, int], ...] = tuple({} for _ in range(MAX_ORDER))
    for profile in profiles:
        for most, counts in zip(repeated, profile.repeated, strict=True):
            for ngram, times in counts.items():
                most[ngram] = max(times, most.get(ngram, 0))
    kinds = zip(*(profile.kinds for profile in profiles), strict=True)
    return NgramProfile(
        profiles[0].length, tuple(frozenset().union(*order) for order in kinds), repeated
    )


def nearest_length(lengths: Iterable[int], hypothesis_len: int) -> int:
    """The length nearest to the hypothesis's, the shorter one of two."""
    return min(lengths, key=lambda length: (abs(length - hypothesis_len), length))


def clipped_matches(first: NgramProfile, second: NgramProfile) -> list[int]:
    """Matching n-grams for n = 1..4, each counted at most as often as in the other sentence.

    Symmetric: BLEU's two directions differ only by their lengths.
    """
    matches = []
    for mine, theirs, my_repeats, their_repeats in zip(
        first.kinds, second.kinds, first.repeated, second.repeated, strict=True
    ):
        shared = len(mine & theirs)
        if my_repeats and their_repeats:
            shared += sum(
                min(times, their_repeats[ngram]) - 1
                for ngram, times in my_repeats.items()
                if ngram in their_repeats
            )
        matches.append(shared)
    return matches


def bleu_from_matches(matches: Sequence[int], hypothesis_len: int, reference_len: int) -> float:
    """BLEU in [0, 1] from the matches of each order and the two lengths in tokens.

    An order without a match gets ln(h) / (5 * 2^c) matches, h the hypothesis length and c the
    number of such orders so far; a one-token hypothesis leaves those orders out. No unigram
    match, or an empty hypothesis, scores 0.
    """
    if matches[0] == 0:
        return 0.0
    logs = []
    zero_orders = 0
    for order, match in enumerate(matches):
        numerator = float(match)
        if match == 0:
            if hypothesis_len == 1:
                continue
            zero_orders += 1
            # In NLTK's order of operations: near-ties of MBR sums must fall the same way.
            numerator = 1.0 / (2**zero_orders * _SMOOTHING_K / math.log(hypothesis_len))
        logs.append(math.log(numerator / max(1, hypothesis_len - order)) / MAX_ORDER)
    penalty = 0.0 if hypothesis_len > reference_len else 1.0 - reference_len / hypothesis_len
    return math.exp(penalty) * math.exp(math.fsum(logs))


def profile_bleu(hypothesis: NgramProfile, reference: NgramProfile) -> float:
    """Sentence BLEU of two profiled sentences, in [0, 1]."""
    matches = clipped_matches(hypothesis, reference)
    return bleu_from_matches(matches, hypothesis.length, reference.length)


def sentence_bleu(hypothesis: str, reference: str) -> float:
    """Sentence BLEU in [0, 1] of two strings, split at whitespace; 0 for an empty hypothesis."""
    return profile_bleu(profile_tokens(hypothesis.split()), profile_tokens(reference.split()))


def pairwise_bleu(profiles: Sequence[NgramProfile]) -> list[list[float]]:
    """BLEU [n, n] of each sentence (row, the hypothesis) against each other; 0 on the diagonal."""
    scores = [[0.0] * len(profiles) for _ in profiles]
    for i, first in enumerate(profiles):
        for j in range(i + 1, len(profiles)):
            second = profiles[j]
            matches = clipped_matches(first, second)
            scores[i][j] = bleu_from_matches(matches, first.length, second.length)
            scores[j][i] = (
                scores[i][j]
                if first.length == second.length
                else bleu_from_matches(matches, second.length, first.length)
            )
    return scores


def distinct_share(token_lists: Sequence[Sequence[str]], order: int) -> float:
    """Distinct over total n-grams, pooled over the sentences; 0 when there are none."""
    pooled = list(chain.from_iterable(ngrams(tokens, order) for tokens in token_lists))
    return len(set(pooled)) / len(pooled) if pooled else 0.0
