"""Encoded pairs of a split, and batches of similar lengths in a seeded order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlmone_fast.autoregressive.vocabulary import Pair, Vocabulary
from dlmone_fast.data.rows import Row
from dlmone_fast.errors import DataError
from dlmone_fast.kernels.noise import Stream, permutation
from dlmone_fast.training.loop import phase_seed

POOL = 50
"""Batches among whose rows those of similar lengths are put together."""

IntArray = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Rows side by side, cut to the longest of them."""

    source: Tensor
    """int64 [B, S]."""
    padded: Tensor | None
    """bool [B, S], True where a source has no token; None: nowhere."""
    target: Tensor
    """int64 [B, L], from the start mark to the token before the end mark."""
    wanted: Tensor
    """int64 [n], the next token of each token that has one."""
    places: Tensor | None
    """int64 [n], where those stand in a flattened [B, L]; None: everywhere."""


class Ragged:
    """Lists of ids in one array."""

    def __init__(self, lists: Sequence[Sequence[int]]) -> None:
        self.lengths: IntArray = np.fromiter(map(len, lists), np.int64, len(lists))
        self._starts: IntArray = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self._ids: IntArray = np.fromiter(
            (i for ids in lists for i in ids), np.int64, int(self.lengths.sum())
        )

    def padded(self, rows: IntArray, fill: int) -> IntArray:
        """The lists of some rows side by side, [B, longest]."""
        lengths = self.lengths[rows]
        places = np.arange(lengths.max())[None]
        inside = places < lengths[:, None]
        block = np.full(inside.shape, fill, np.int64)
        block[inside] = self._ids[(self._starts[rows][:, None] + places)[inside]]
        return block


@dataclass(frozen=True)
class Dropped:
    """Rows that a training does not see, by reason."""

    unknown: int = 0
    """With a character or symbol that the vocabulary lacks."""
    long: int = 0
    """With more tokens than the model has positions for."""

    @property
    def any(self) -> bool:
        return bool(self.unknown or self.long)

    def __str__(self) -> str:
        return f"{self.unknown} with unknown symbols, {self.long} too long"


class Pairs:
    """The encoded pairs of a split.

    Args:
        encoded: ids of source and target, marks included.
        pad_id: fills the short rows of a batch.
    """

    def __init__(self, encoded: Sequence[Pair], pad_id: int) -> None:
        self.sources = Ragged([source for source, _ in encoded])
        self.targets = Ragged([target for _, target in encoded])
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.sources.lengths)

    def batch(self, rows: IntArray) -> Batch:
        """The pairs of some rows."""
        source = self.sources.padded(rows, self.pad_id)
        target = self.targets.padded(rows, self.pad_id)
        lengths = self.sources.lengths[rows]
        padded = None
        if lengths.min() != source.shape[1]:
            padded = torch.from_numpy(np.arange(source.shape[1])[None] >= lengths[:, None])
        wanted = target[:, 1:].reshape(-1)
        ends = self.targets.lengths[rows] - 1
        places = None
        if ends.min() != target.shape[1] - 1:
            (kept,) = np.nonzero((np.arange(target.shape[1] - 1)[None] < ends[:, None]).reshape(-1))
            wanted, places = wanted[kept], torch.from_numpy(kept)
        return Batch(
            torch.from_numpy(source),
            padded,
            torch.from_numpy(np.ascontiguousarray(target[:, :-1])),
            torch.from_numpy(wanted),
            places,
        )

    def steps_of_epoch(self, batch_size: int) -> int:
        """Batches in which each row stands once."""
        return -(-len(self) // batch_size)

    def order(self, seed: int, epoch: int, batch_size: int) -> list[IntArray]:
        """Rows of each batch of an epoch: a pure function of the arguments.

        Rows are permuted; within pools of 50 batches they are sorted by their lengths; then the
        batches are permuted, so that lengths do not come in waves.
        """
        rows = permutation(seed, Stream.DATA_ORDER, epoch, len(self)).numpy()
        batches: list[IntArray] = []
        for first in range(0, len(rows), POOL * batch_size):
            pool = rows[first : first + POOL * batch_size]
            by = np.lexsort((self.targets.lengths[pool], self.sources.lengths[pool]))
            pool = pool[by]
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        mixed = permutation(phase_seed(seed, 1), Stream.DATA_ORDER, epoch, len(batches))
        return [batches[i] for i in mixed.tolist()]

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """All pairs once, sorted by length."""
        by = np.lexsort((self.targets.lengths, self.sources.lengths))
        for first in range(0, len(by), batch_size):
            yield self.batch(by[first : first + batch_size])


def encode_pairs(
    rows: Sequence[Row],
    vocabulary: Vocabulary,
    positions: tuple[int, int],
    both_directions: bool = False,
) -> tuple[Pairs, Dropped]:
    """The pairs of a split that a model can be trained on, and a count of the others.

    Args:
        positions: the most tokens of a source and of a target, as the model has positions.

    Raises:
        DataError: none is left.
    """
    texts = [(row.src, row.trg) for row in rows]
    if both_directions:
        texts += [(target, source) for source, target in texts]
    encoded, unknown = vocabulary.pairs(texts)
    known = [pair for pair in encoded if pair is not None]
    # A target's last token is wanted, never read.
    kept = [
        (source, target)
        for source, target in known
        if len(source) <= positions[0] and len(target) - 1 <= positions[1]
    ]
    dropped = Dropped(unknown, len(known) - len(kept))
    if not kept:
        raise DataError(
            f"none of {len(texts):,} pairs can be used ({dropped}); name other data, or raise "
            "model.source_positions and model.target_positions"
        )
    return Pairs(kept, vocabulary.pad_id), dropped
