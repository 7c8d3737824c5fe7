"""Alignment of a word's letters to the symbols that they stand for: none, one or two each.

The alignment is monotone. Each letter has one label: `_` (no symbol), `p`, or `p+q`. Costs of
labels are learned by hard EM (Viterbi training): align every pair with the costs, count, and take
the negative log relative frequencies as new costs. With one label a letter, a tagger reads and
writes the same positions; see Jiampojamarn, Kondrak and Sherif, NAACL 2007, for many-to-many
alignments and what they are good for.

Costs are whole numbers (thousandths of a nat), so sums are exact and the same pairs have the same
alignment on every machine.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dlmone_fast.errors import DataError

BLANK_LABEL = "_"
JOIN = "+"
MAX_CELLS = 1 << 24
"""Letters times labels: costs are held for each letter with each label."""
MAX_SYMBOL_CHARS = 40
MAX_WORD = 1024
"""Letters of a word that is aligned; a longer one cannot be."""
UNSEEN_COST = 11_513
"""Cost of a label that a letter never had: that of one in 100,000."""

_MAX_COST = 1 << 24
_FORBIDDEN = 1 << 40
_ROUNDS = 4
_SCALE = 1000
# Of the counts to begin with, beside 1 for a symbol. Without any for two symbols, letters that
# mean two (x) end in a poorer optimum; these gave CMUdict's cheapest alignments of those tried.
_FIRST_BLANK = 0.25
_FIRST_COUPLE = 0.05
# Cells of the dynamic program that are held at once.
_HELD_CELLS = 1 << 22

Pair = tuple[str, Sequence[str]]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Alignment:
    """Learned costs of labels, and the best alignment under them.

    Attributes:
        letters: source symbols, one character each, sorted.
        labels: target labels, sorted; `p+q` stands for two symbols.
        costs: letter → label → cost in thousandths of a nat; what is not listed costs
            `UNSEEN_COST`.
    """

    letters: tuple[str, ...]
    labels: tuple[str, ...]
    costs: Mapping[str, Mapping[str, int]]

    def align(self, source: str, target: str | Sequence[str]) -> list[str] | None:
        """One label for each letter of `source`; together they spell `target`.

        Args:
            source: a word; each character is a letter.
            target: its symbols, as a list or separated by spaces.

        Returns:
            As many labels as letters, or None: a letter or symbol is unknown, there are more
            symbols than the letters can hold, or the word is longer than `MAX_WORD`.
        """
        return self.align_all([(source, split_symbols(target))])[0]

    def align_all(self, pairs: Sequence[Pair]) -> list[list[str] | None]:
        """`align` of many pairs at once, in order; hundreds of times faster than one by one."""
        return self._program.align(pairs)

    @cached_property
    def _program(self) -> _Program:
        return _Program(self.letters, self.labels, self.costs)


def learn_alignment(pairs: Iterable[tuple[str, str | Sequence[str]]]) -> Alignment:
    """Learn the costs of labels from words and their symbols; the same pairs give the same costs.

    Labels are those that the best alignments of the pairs use. Pairs that cannot be aligned, with
    more than two symbols a letter, have no part in it.

    Args:
        pairs: words and their symbols (a list, or separated by spaces), at least one of which can
            be aligned.

    Raises:
        DataError: a symbol is written as labels are (`_`, or with `+` inside), there are too many
            letters or symbols, or no pair can be aligned.
    """
    kept = [(source, split_symbols(target)) for source, target in pairs]
    symbols = sorted({symbol for _, target in kept for symbol in target})
    _check_symbols(symbols)
    letters = sorted({letter for source, _ in kept for letter in source})
    couples = sorted({JOIN.join(pair) for _, target in kept for pair in pairwise(target)})
    labels = [BLANK_LABEL, *symbols, *couples]
    if len(letters) * (len(labels) + 1) > MAX_CELLS:
        raise DataError(
            f"{len(letters)} letters and {len(labels)} labels ({len(symbols)} symbols and pairs of "
            f"them) in the data, their product may be {MAX_CELLS}; alignment is for small "
            "alphabets: use data.tokenizer = 'wordpiece'"
        )
    costs = _first_costs(kept)
    for _ in range(_ROUNDS):
        costs = _costs_of(kept, _Program(letters, labels, costs).align(kept))
    used = sorted({label for of_letter in costs.values() for label in of_letter})
    if not used:
        raise DataError(
            f"none of {len(kept)} pairs can be aligned: each letter stands for two symbols at "
            "most; give words as src, and their symbols, separated by spaces, as trg"
        )
    return Alignment(tuple(sorted(costs)), tuple(used), costs)


def split_symbols(target: str | Sequence[str]) -> Sequence[str]:
    """The symbols of a target: a list as it is, a text split at its white space."""
    return target.split() if isinstance(target, str) else target


def label_symbols(label: str) -> list[str]:
    """The symbols that a label stands for: none, one or two."""
    return [] if label == BLANK_LABEL else label.split(JOIN)


def is_symbol(text: str) -> bool:
    """Whether a text can be a symbol: short, without white space, unlike what labels add."""
    plain = text != BLANK_LABEL and JOIN not in text and text.split() == [text]
    return plain and len(text) <= MAX_SYMBOL_CHARS


def check_costs(costs: Mapping[str, Mapping[str, int]]) -> None:
    """Raise ValueError, with the reason, for costs that the program cannot add up."""
    for letter, of_letter in costs.items():
        for label, cost in of_letter.items():
            if type(cost) is not int or not 0 <= cost <= _MAX_COST:
                raise ValueError(
                    f"{letter!r} {label!r:.40}: expected a whole number from 0 to {_MAX_COST}, "
                    f"got {cost!r:.40}"
                )


def _check_symbols(symbols: Sequence[str]) -> None:
    for symbol in symbols:
        if not is_symbol(symbol):
            raise DataError(
                f"symbol {symbol!r:.80} of the targets: expected at most {MAX_SYMBOL_CHARS} "
                f"characters without white space, other than {BLANK_LABEL!r} and without {JOIN!r}, "
                "which labels are written with; rename it"
            )


def _first_costs(pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """Costs to begin with: letters go with the symbols at about the same place in their word."""
    counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for source, target in pairs:
        for place, letter in enumerate(source):
            of_letter = counts[letter]
            middle = round(place * len(target) / len(source))
            near = target[max(0, middle - 1) : middle + 2]
            of_letter[BLANK_LABEL] += _FIRST_BLANK
            for symbol in near:
                of_letter[symbol] += 1.0
            for couple in pairwise(near):
                of_letter[JOIN.join(couple)] += _FIRST_COUPLE
    return _costs(counts)


def _costs_of(
    pairs: Sequence[Pair], aligned: Sequence[list[str] | None]
) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (source, _), labels in zip(pairs, aligned, strict=True):
        if labels is not None:
            for letter, label in zip(source, labels, strict=True):
                counts[letter][label] += 1.0
    return _costs(counts)


def _costs(counts: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, int]]:
    costs: dict[str, dict[str, int]] = {}
    for letter in sorted(counts):
        total = math.fsum(counts[letter].values())
        costs[letter] = {
            label: min(UNSEEN_COST, round(-_SCALE * math.log(count / total)))
            for label, count in sorted(counts[letter].items())
        }
    return costs


class _Program:
    """The dynamic program over all pairs of one word length at a time.

    State j after i letters: j symbols are spelled. `best` [B, M + 1] is carried from letter to
    letter; of equal costs the label with fewer symbols wins.
    """

    def __init__(
        self,
        letters: Sequence[str],
        labels: Sequence[str],
        costs: Mapping[str, Mapping[str, int]],
    ) -> None:
        self.labels = labels
        self._letters = {letter: i for i, letter in enumerate(letters)}
        self._symbols: dict[str, int] = {}
        for label in labels:
            for symbol in label_symbols(label):
                self._symbols.setdefault(symbol, len(self._symbols))
        label_ids = {label: i for i, label in enumerate(labels)}
        self._blank = label_ids.get(BLANK_LABEL, len(labels))
        # Label of a symbol, and of a pair of symbols by first * n + second; sparse, as most pairs
        # never occur. The last column of the costs is that of no label.
        n = len(self._symbols)
        self._single = np.full(n + 1, len(labels))
        self._pair_keys, self._pair_labels = self._pairs(label_ids, n)
        for symbol, place in self._symbols.items():
            self._single[place] = label_ids.get(symbol, len(labels))
        self._costs = np.full((len(letters), len(labels) + 1), UNSEEN_COST, dtype=np.int64)
        self._costs[:, -1] = _FORBIDDEN
        for letter, of_letter in costs.items():
            for label, cost in of_letter.items():
                self._costs[self._letters[letter], label_ids[label]] = cost

    def _pairs(self, label_ids: Mapping[str, int], n: int) -> tuple[Ints, Ints]:
        keyed = sorted(
            (self._symbols[parts[0]] * (n + 1) + self._symbols[parts[1]], label_ids[label])
            for label in label_ids
            if len(parts := label_symbols(label)) == 2
        )
        table = np.array(keyed, dtype=np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def align(self, pairs: Sequence[Pair]) -> list[list[str] | None]:
        aligned: list[list[str] | None] = [None] * len(pairs)
        by_length: dict[int, list[int]] = defaultdict(list)
        for at, (source, target) in enumerate(pairs):
            if self._possible(source, target):
                by_length[len(source)].append(at)
        for length, places in sorted(by_length.items()):
            size = max(1, _HELD_CELLS // (length * (2 * length + 1)))
            for first in range(0, len(places), size):
                chunk = places[first : first + size]
                for at, labels in zip(chunk, self._chunk([pairs[at] for at in chunk]), strict=True):
                    aligned[at] = labels
        return aligned

    def _possible(self, source: str, target: Sequence[str]) -> bool:
        return (
            0 < len(source) <= MAX_WORD
            and len(target) <= 2 * len(source)
            and all(letter in self._letters for letter in source)
            and all(symbol in self._symbols for symbol in target)
        )

    def _chunk(self, pairs: Sequence[Pair]) -> list[list[str] | None]:
        """Alignments of pairs whose words have one length."""
        letters = np.array([[self._letters[x] for x in source] for source, _ in pairs])
        lengths = np.array([len(target) for _, target in pairs])
        single, double = self._target_labels([target for _, target in pairs], int(lengths.max()))
        rows = np.arange(len(pairs))
        best = np.full((len(pairs), single.shape[1] + 1), _FORBIDDEN)
        best[:, 0] = 0
        steps = np.zeros((letters.shape[1], *best.shape), dtype=np.int8)
        for place in range(letters.shape[1]):
            letter = letters[:, place, None]
            reached = best + self._costs[letter, self._blank]
            for symbols, labels in ((1, single), (2, double)):
                from_state = best[:, :-symbols]
                other = from_state + self._costs[letter, labels[:, : from_state.shape[1]]]
                better = other < reached[:, symbols:]
                reached[:, symbols:][better] = other[better]
                steps[place][:, symbols:][better] = symbols
            best = np.minimum(reached, _FORBIDDEN)
        possible = best[rows, lengths] < _FORBIDDEN
        found = self._traced(steps, lengths, single, double)
        return [
            [self.labels[label] for label in row] if ok else None
            for row, ok in zip(found.tolist(), possible.tolist(), strict=True)
        ]

    def _target_labels(self, targets: Sequence[Sequence[str]], most: int) -> tuple[Ints, Ints]:
        """Labels [B, M] of the symbol at each place, and of it and the next."""
        n = len(self._symbols)
        symbols = np.full((len(targets), most + 2), n)
        for row, target in enumerate(targets):
            symbols[row, : len(target)] = [self._symbols[symbol] for symbol in target]
        keys = symbols[:, :-1] * (n + 1) + symbols[:, 1:]
        places = np.searchsorted(self._pair_keys, keys)
        places = np.minimum(places, max(0, len(self._pair_keys) - 1))
        double = np.full(keys.shape, len(self.labels))
        if len(self._pair_keys):
            known = self._pair_keys[places] == keys
            double[known] = self._pair_labels[places][known]
        return self._single[symbols[:, :-1]], double

    def _traced(
        self, steps: npt.NDArray[np.int8], lengths: Ints, single: Ints, double: Ints
    ) -> Ints:
        """Labels [B, N], read from the last letter back."""
        rows, at = np.arange(len(lengths)), lengths.copy()
        found = np.zeros((len(lengths), len(steps)), dtype=np.int64)
        for place in reversed(range(len(steps))):
            taken = steps[place][rows, at]
            at = at - taken
            start = np.maximum(at, 0)
            one, two = single[rows, start], double[rows, start]
            found[:, place] = np.choose(taken, [np.full_like(one, self._blank), one, two])
        return found
