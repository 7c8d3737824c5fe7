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
MAX_ALPHABET = 1000

Pair = tuple[str, str]


def learn_pieces(word_counts: Mapping[str, int], size: int) -> list[str]:
    """Return at most `size` pieces: the alphabet, then byte-pair merges by falling count.

    `word_counts` holds normalised, pre-split words. At most a third of `size` (and 1,000)
    characters are kept, the most frequent; a word with a rarer one has no part in the merges.
    Fewer than `size` pieces come back when no pair is left that occurs twice.
    """
    alphabet = _alphabet(word_counts, min(MAX_ALPHABET, max(1, size // 3)))
    words, counts = [], []
    for word in sorted(word_counts):
        if len(word) <= MAX_WORD_CHARS and alphabet.issuperset(word):
            words.append([word[0], *(PREFIX + char for char in word[1:])])
            counts.append(word_counts[word])
    continuations = {piece for word in words for piece in word[1:]}
    pieces = dict.fromkeys([*sorted(alphabet), *sorted(continuations)])
    for left, right in _merges(words, counts):
        if len(pieces) >= size:
            break
        pieces[left + right.removeprefix(PREFIX)] = None
    return list(pieces)[:size]


def _alphabet(word_counts: Mapping[str, int], limit: int) -> set[str]:
    counts: Counter[str] = Counter()
    for word, count in word_counts.items():
        for char in word:
            counts[char] += count
    return set(sorted(counts, key=lambda char: (-counts[char], char))[:limit])


def _merges(words: list[list[str]], counts: list[int]) -> Iterable[Pair]:
    """Yield the most frequent pair of neighbours and merge it in `words`, again and again."""
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
        yield pair
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
