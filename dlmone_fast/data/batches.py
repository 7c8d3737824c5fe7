"""Batches of laid-out ids, and their order as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dlmone_fast.checks import as_whole, is_whole
from dlmone_fast.config import ModelConfig
from dlmone_fast.config.room import SEPARATORS
from dlmone_fast.data.cache import TokenCache
from dlmone_fast.data.layouts import check_seq_len, layout_source, source_limit
from dlmone_fast.data.slots import batch_in_slots, source_lengths
from dlmone_fast.errors import UsageError
from dlmone_fast.kernels.noise import LIMIT, Stream, permutation
from dlmone_fast.text_tokenizer import TextTokenizer

# Batches that are sorted by length together: enough for even lengths, few enough to stay mixed.
_POOL = 40

Rows = Sequence[int] | npt.NDArray[np.int64] | torch.Tensor
IntArray = npt.NDArray[np.int64]


def training_batch(
    cache: TokenCache, rows: Rows, sizes: ModelConfig, tokenizer: TextTokenizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), int64 [B, L], of rows as a model of these sizes reads them.

    L is `seq_len`, or less where sources are in slots and the batch's are short.
    """
    if sizes.in_slots:
        return batch_in_slots(cache, _checked_rows(rows, len(cache)), sizes, tokenizer)
    return batch(cache, rows, sizes.seq_len, tokenizer, sizes.source_positions)


def batch(
    cache: TokenCache, rows: Rows, seq_len: int, tokenizer: TextTokenizer, source_positions: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, mask), int64 [B, seq_len], of `rows` laid out as `dlmone_fast.data.layout`.

    Raise UsageError for a row outside the cache.
    """
    check_seq_len(seq_len, source_positions)
    index = _checked_rows(rows, len(cache))
    exchanged = index >= cache.stored
    laid_out = partial(
        _laid_out, seq_len=seq_len, tokenizer=tokenizer, source_positions=source_positions
    )
    if not exchanged.any():
        return laid_out(cache, index)
    ids = torch.empty(len(index), seq_len, dtype=torch.int64)
    mask = torch.empty_like(ids)
    for direction, first, chosen in (
        (cache, 0, ~exchanged),
        (cache.exchanged(), cache.stored, exchanged),
    ):
        ids[chosen], mask[chosen] = laid_out(direction, index[chosen] - first)
    return ids, mask


def _laid_out(
    cache: TokenCache,
    index: IntArray,
    seq_len: int,
    tokenizer: TextTokenizer,
    source_positions: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    src_start, src_length = _spans(cache.src_offsets, index)
    trg_start, trg_length = _spans(cache.trg_offsets, index)
    src_kept, trg_kept = kept_lengths(src_length, trg_length, seq_len, source_positions)

    position = np.arange(seq_len)[None, :]
    sep = src_kept[:, None]
    given = np.full_like(sep, source_positions) if source_positions else sep + 2
    end = given + trg_kept[:, None]
    in_src = position < sep
    in_trg = (position >= given) & (position < end)
    ids = np.full((len(index), seq_len), tokenizer.pad_id, dtype=np.int64)
    ids[(position == sep) | (position == sep + 1) | (position == end)] = tokenizer.sep_id
    ids[in_src] = cache.src_ids[(src_start[:, None] + position)[in_src]]
    ids[in_trg] = cache.trg_ids[(trg_start[:, None] + position - given)[in_trg]]
    mask = (position >= given).astype(np.int64)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def without_sources(
    ids: torch.Tensor, rows: torch.Tensor, pad_id: int, sep_id: int
) -> torch.Tensor:
    """ids [B, L] with [PAD] for what stands between a source's [CLS] and [SEP] in the rows [n]."""
    position = torch.arange(ids.shape[1])
    # Text never holds [SEP]: the first one ends the source.
    ends = (ids[rows] == sep_id).int().argmax(1, keepdim=True)
    source = (position >= 1) & (position < ends)
    dropped = ids.clone()
    dropped[rows] = ids[rows].masked_fill(source, pad_id)
    return dropped


def source_batch(
    sources: Sequence[Sequence[int]],
    seq_len: int,
    tokenizer: TextTokenizer,
    max_source_tokens: int | None = None,
    on_overflow: Literal["error", "truncate"] = "error",
    source_positions: int = 0,
    named: Callable[[int], str] = "sources[{}]".format,
) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """Lay out sources for generation: (ids, mask) int64 [B, seq_len] and which were truncated.

    Errors call the source at a place `named(place)`.
    """
    limit = source_limit(seq_len, max_source_tokens, source_positions)
    pairs = [
        layout_source(
            ids,
            seq_len,
            limit,
            on_overflow=on_overflow,
            sep_id=tokenizer.sep_id,
            pad_id=tokenizer.pad_id,
            cls_id=tokenizer.cls_id,
            source_positions=source_positions,
            name=named(place),
        )
        for place, ids in enumerate(sources)
    ]
    ids = torch.tensor([ids for ids, _ in pairs], dtype=torch.int64).reshape(-1, seq_len)
    mask = torch.tensor([mask for _, mask in pairs], dtype=torch.int64).reshape(-1, seq_len)
    return ids, mask, [len(source) > limit for source in sources]


def epoch_order(
    seed: int, epoch: int, rows: int, stream: Stream = Stream.DATA_ORDER
) -> torch.Tensor:
    """Return the order of the rows in one epoch, int64 [rows], a pure function of its arguments."""
    return permutation(seed, stream, epoch, rows)


class BatchStream:
    """Training batches without end: epoch after epoch, each row once an epoch.

    Batch `step` holds places step·B … step·B + B - 1 of the endless sequence of epochs, so a
    batch may span two of them and no row is lost; training resumes anywhere without a state.
    Two streams with different `stream` are independent draws.

    With `lengths`, one a row, rows of similar length share a batch: the order's batches are sorted
    by length within pools of `_POOL` batches, and the pool's batches are shuffled.
    """

    def __init__(
        self,
        cache: Sized,
        seed: int,
        batch_size: int,
        stream: Stream = Stream.DATA_ORDER,
        lengths: IntArray | None = None,
    ) -> None:
        self.rows = len(cache)
        self.lengths = lengths
        if self.rows < 1:
            raise UsageError("cache: expected at least one row, got none")
        if not is_whole(batch_size, 1, 2**24):
            raise UsageError(f"batch_size: expected 1 to {2**24}, got {batch_size!r}")
        self.seed = seed
        self.batch_size = batch_size
        self.stream = stream
        self._cached_order: tuple[int, IntArray] | None = None

    def batch_rows(self, step: int) -> IntArray:
        """Return the row indices of global batch `step` (from 0), int64 [batch_size]."""
        if not is_whole(step, 0, 2**48 - 1):
            raise UsageError(f"step: expected 0 to {2**48 - 1}, got {step}")
        place, left, parts = step * self.batch_size, self.batch_size, []
        while left:
            epoch, start = divmod(place, self.rows)
            part = self._order(epoch)[start : start + left]
            parts.append(part)
            place, left = place + len(part), left - len(part)
        return np.concatenate(parts)

    def _order(self, epoch: int) -> IntArray:
        if self._cached_order is None or self._cached_order[0] != epoch:
            # One counter word names the epoch. Beyond it orders come again.
            order = epoch_order(self.seed, epoch % LIMIT, self.rows, self.stream).numpy()
            if self.lengths is not None:
                order = self._by_length(order, epoch)
            self._cached_order = (epoch, order)
        return self._cached_order[1]

    def _by_length(self, order: IntArray, epoch: int) -> IntArray:
        """An epoch's order with rows of similar length side by side, batch by batch."""
        assert self.lengths is not None
        size = self.batch_size
        # The epoch's first rows fill up the batch that the epoch before has begun.
        first = -epoch * self.rows % size
        whole = max(0, (len(order) - first) // size)
        batches = order[first : first + whole * size].copy().reshape(whole, size)
        for start in range(0, whole, _POOL):
            pool = batches[start : start + _POOL]
            rows = pool.reshape(-1)
            by_length = np.argsort(self.lengths[rows], kind="stable")
            sorted_pool = rows[by_length].reshape(pool.shape)
            number = epoch * -(-whole // _POOL) + start // _POOL
            mixed = permutation(self.seed, Stream.BATCH_ORDER, number % LIMIT, len(pool))
            batches[start : start + _POOL] = sorted_pool[mixed.numpy()]
        return np.concatenate([order[:first], batches.reshape(-1), order[first + whole * size :]])


def lengths_for(cache: TokenCache, sizes: ModelConfig) -> IntArray | None:
    """Source lengths, by which rows share a batch where batches are cut to them; else None."""
    return source_lengths(cache) if sizes.in_slots else None


def batches_in_order(rows: int, batch_size: int) -> Iterator[IntArray]:
    """Yield row indices 0 … rows - 1 in order, the last batch ragged (evaluation)."""
    if (as_whole(batch_size) or 0) < 1:
        raise UsageError(f"batch_size: expected at least 1, got {batch_size!r}")
    for start in range(0, rows, batch_size):
        yield np.arange(start, min(start + batch_size, rows), dtype=np.int64)


def _checked_rows(rows: Rows, count: int) -> IntArray:
    index = np.asarray(rows)
    if index.ndim != 1 or index.size == 0 or index.dtype.kind not in "iu":
        raise UsageError(f"rows: expected a non-empty list of row numbers, got {rows!r:.60}")
    if index.min() < 0 or index.max() >= count:
        raise UsageError(f"rows: expected 0 to {count - 1}, got {index.min()} to {index.max()}")
    return index.astype(np.int64)


def _spans(offsets: IntArray, index: IntArray) -> tuple[IntArray, IntArray]:
    """Return each row's first place and its length without the final [SEP]."""
    start = np.asarray(offsets[index])
    return start, np.asarray(offsets[index + 1]) - start - 1


def kept_lengths(
    src: IntArray, trg: IntArray, seq_len: int, source_positions: int
) -> tuple[IntArray, IntArray]:
    """`layouts.kept_lengths` for arrays: the same rule, element by element."""
    if source_positions:
        room = seq_len - source_positions - 1
        return np.minimum(src, source_positions - 2), np.minimum(trg, room)
    room = seq_len - SEPARATORS
    shorter = np.minimum(src, trg)
    longer_kept = np.where(2 * shorter > room, room // 2, room - shorter)
    both = np.where(2 * shorter > room, room // 2, shorter)
    fits = src + trg <= room
    src_kept = np.where(fits, src, np.where(src > trg, longer_kept, both))
    trg_kept = np.where(fits, trg, np.where(trg > src, longer_kept, both))
    return src_kept, trg_kept
