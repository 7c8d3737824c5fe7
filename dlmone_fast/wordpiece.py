"""Learn a WordPiece vocabulary, the same one on every run and machine.

The trainer of the `tokenizers` library (0.23.3) numbers its pieces in hash-map order, so two
runs over the same text give two vocabularies. Here ties are broken by the pieces' own text.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

PREFIX = "##"
MAX_WORD_CHARS = 100
MIN_PAIR_COUNT = 2
FIRST_ALPHABET = 1000

Pair = tuple[str, str]


def learn_pieces(word_counts: Mapping[str, int], size: int) -> list[str]:
    """Return at most `size` pieces: the alphabet, then byte-pair merges by falling count.

    `word_counts` holds normalised, pre-split words. The alphabet is the most frequent characters,
    up to 1,000 or a third of `size`; beyond those a character takes a place that is free, or that
    of a merge which is not more frequent: a lost character loses whole words, a lost merge none. A
    word with a character that has no place has no part in the merges.
    Fewer than `size` pieces come back when no pair is left that occurs twice.
    """
    frequent = _characters(word_counts)
    first = min(FIRST_ALPHABET, max(1, size // 3))
    alphabet = {char for char, _, _ in frequent[:first]}
    pieces, merged = _pieces(word_counts, alphabet, size)
    further = _further(frequent[first:], size - len(pieces), merged)
    if further:
        pieces, _ = _pieces(word_counts, alphabet | further, size)
    return pieces


def _pieces(
    word_counts: Mapping[str, int], alphabet: set[str], size: int
) -> tuple[list[str], list[int]]:
    """Pieces over an alphabet, and the counts of the merges among them, in their order."""
    words, counts = [], []
    for word in sorted(word_counts):
        if len(word) <= MAX_WORD_CHARS and alphabet.issuperset(word):
            words.append([word[0], *(PREFIX + char for char in word[1:])])
            counts.append(word_counts[word])
    continuations = {piece for word in words for piece in word[1:]}
    pieces = dict.fromkeys([*sorted(alphabet), *sorted(continuations)])
    merged: list[int] = []
    for (left, right), count in _merges(words, counts):
        if len(pieces) >= size:
            break
        piece = left + right.removeprefix(PREFIX)
        if piece not in pieces:
            pieces[piece] = None
            merged.append(count)
    return list(pieces)[:size], merged


def _characters(word_counts: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Characters by falling count, each with its count and the number of pieces that it needs."""
    counts: Counter[str] = Counter()
    continuing: set[str] = set()
    for word, count in word_counts.items():
        if len(word) > MAX_WORD_CHARS:
            continue
        for char in word:
            counts[char] += count
        continuing.update(word[1:])
    ordered = sorted(counts, key=lambda char: (-counts[char], char))
    return [(char, counts[char], 2 if char in continuing else 1) for char in ordered]


def _further(rare: list[tuple[str, int, int]], free: int, merged: list[int]) -> set[str]:
    """The characters that take a free place, or that of a merge which is not more frequent."""
    chosen: set[str] = set()
    merged = list(merged)
    for char, count, places in rare:
        while free < places and merged and merged[-1] <= count:
            merged.pop()
            free += 1
        if free < places:
            break
        free -= places
        chosen.add(char)
    return chosen


def _merges(words: list[list[str]], counts: list[int]) -> Iterable[tuple[Pair, int]]:
    """Yield the most frequent pair of neighbours with its count and merge it in `words`, again and
    again; no count is above the one before."""
    pair_counts: Counter[Pair] = Counter()
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[index]
            words_with[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while heap:
        negative_count, pair = heapq.heappop(heap)
        # Each change of a count pushes a new entry, so an entry with another count is stale.
        if pair_counts[pair] != -negative_count:
            continue
        if -negative_count < MIN_PAIR_COUNT:
            return
        yield pair, -negative_count
        changed: set[Pair] = set()
        for index in words_with.pop(pair):
            word = words[index]
            merged = _merged(word, pair)
            for old in pairwise(word):
                pair_counts[old] -= counts[index]
                changed.add(old)
            for new in pairwise(merged):
                pair_counts[new] += counts[index]
                words_with[new].add(index)
                changed.add(new)
            words[index] = merged
        changed.discard(pair)
        for other in changed:
            if pair_counts[other] >= MIN_PAIR_COUNT:
                heapq.heappush(heap, (-pair_counts[other], other))


def _merged(word: list[str], pair: Pair) -> list[str]:
    left, right = pair
    merged, position = [], 0
    while position < len(word):
        if word[position] == left and word[position + 1 : position + 2] == [right]:
            merged.append(left + right.removeprefix(PREFIX))
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return merged
