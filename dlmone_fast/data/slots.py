"""Sequences whose target has slots of its own, in front of the source (`model.source`).

    masked    ids   target [SEP] [PAD] …          | [CLS] source [SEP] ∅ …
              mask    1      1     1               |   0     0      0   0
    aligned   ids   label of each source symbol ∅ …| source symbol …   ∅ …
              mask    1                         0  |   0               0

∅ is `absent_id`, one beyond the vocabulary: its embedding is zero, which no token's is, and the
backbone attends to no source position that holds zeros. The target comes first, so that a slot's
noise, which is a function of its position, does not depend on how long the batch's sources are.
Sequences are cut to the longest source among them: the network computes nothing for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlmone_fast.config import ModelConfig
from dlmone_fast.config.room import largest_source
from dlmone_fast.data.cache import TokenCache
from dlmone_fast.errors import DataError, PromptError
from dlmone_fast.text_tokenizer import TextTokenizer

IntArray = npt.NDArray[np.int64]


def absent_id(vocab_size: int) -> int:
    """The id of a position that holds nothing."""
    return vocab_size


def batch_in_slots(
    cache: TokenCache, index: IntArray, sizes: ModelConfig, tokenizer: TextTokenizer
) -> tuple[Tensor, Tensor]:
    """(ids, mask), int64 [B, L], of rows of a cache, cut to their longest source.

    Raises:
        DataError: an aligned row has not one label for each source symbol.
    """
    pairs = [cache.pair(int(row)) for row in index]
    ids, mask = _empty([source for source, _ in pairs], sizes)
    slots = sizes.slots_of(ids.shape[1])
    for row, (source, target) in enumerate(pairs):
        if sizes.source == "aligned":
            if len(source) != len(target):
                raise DataError(
                    f"row {index[row]}: {len(source) - 2} source symbols and {len(target) - 2} "
                    "labels; an aligned source needs data.tokenizer = 'aligned'"
                )
            kept = target[1:-1][:slots]
            mask[row, : len(kept)] = 1
        else:
            # [CLS] stands at every target's start: a slot for it would say nothing.
            kept = [*target[1:-1][: slots - 1], tokenizer.sep_id]
            ids[row, len(kept) : slots] = tokenizer.pad_id
            mask[row, :slots] = 1
        ids[row, : len(kept)] = kept
    return torch.from_numpy(ids), torch.from_numpy(mask)


def sources_in_slots(
    encoded: Sequence[Sequence[int]],
    sizes: ModelConfig,
    pad_id: int,
    limit: int | None = None,
    on_overflow: str = "error",
    named: Callable[[int], str] = "sources[{}]".format,
) -> tuple[Tensor, Tensor, list[bool]]:
    """Sources laid out for generation: (ids, mask) int64 [B, L], and which were cut.

    Args:
        encoded: ids of each source from [CLS] to [SEP].
        sizes: the model's.
        pad_id: the id that stands in the target's slots, where nothing is read.
        limit: most tokens of a source with [CLS] and [SEP]; None: what its positions hold.
        on_overflow: "error" refuses a longer source, "truncate" cuts it.
        named: what an error calls the source at a place.

    Raises:
        PromptError: a source is longer than the limit.
    """
    largest = largest_source(sizes.seq_len, sizes.source_positions, sizes.source)
    limit = min(limit or largest, largest)
    kept, cut = [], [len(source) > limit for source in encoded]
    for row, source in enumerate(encoded):
        if cut[row] and on_overflow == "error":
            unit = "symbols" if sizes.source == "aligned" else "tokens"
            raise PromptError(
                f"{named(row)}: {len(source) - 2} {unit}, the limit is {limit - 2}; shorten it or "
                "pass on_overflow='truncate'"
            )
        kept.append([*source[: limit - 1], source[-1]] if cut[row] else source)
    ids, mask = _empty(kept, sizes)
    slots = sizes.slots_of(ids.shape[1])
    for row, source in enumerate(kept):
        generated = len(source) - 2 if sizes.source == "aligned" else slots
        ids[row, :generated] = pad_id
        mask[row, :generated] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask), cut


def trimmed(ids: Tensor, mask: Tensor, sizes: ModelConfig) -> tuple[Tensor, Tensor]:
    """Sequences [B, L] cut to the longest source among these rows."""
    slots = sizes.slots_of(ids.shape[1])
    present = (ids[:, slots:] != absent_id(sizes.vocab_size)).any(0)
    longest = int(present.sum())
    if longest == ids.shape[1] - slots:
        return ids, mask
    columns = [
        range(longest if sizes.source == "aligned" else slots),
        range(slots, slots + longest),
    ]
    chosen = torch.tensor([place for part in columns for place in part])
    return ids[:, chosen], mask[:, chosen]


def at_full_length(ids: Tensor, mask: Tensor, sizes: ModelConfig) -> tuple[Tensor, Tensor]:
    """Sequences [B, L] at the model's own length: what `trimmed` cut is absent again."""
    slots = sizes.slots_of(ids.shape[1])
    full = torch.full((len(ids), sizes.seq_len), absent_id(sizes.vocab_size), dtype=ids.dtype)
    full_mask = torch.zeros(len(ids), sizes.seq_len, dtype=mask.dtype)
    source = ids.shape[1] - slots
    for out, values in ((full, ids), (full_mask, mask)):
        out[:, :slots] = values[:, :slots]
        first = sizes.target_slots
        out[:, first : first + source] = values[:, slots:]
    return full, full_mask


def source_lengths(cache: TokenCache) -> IntArray:
    """Tokens of each row's source, int64 [rows]; the sides of exchanged rows change places."""
    sides = [cache.src_offsets, cache.trg_offsets] if cache.both_directions else [cache.src_offsets]
    return np.concatenate([side[1:] - side[:-1] for side in sides])


def _empty(sources: Sequence[Sequence[int]], sizes: ModelConfig) -> tuple[IntArray, IntArray]:
    """Sequences [B, L] with their sources alone, and masks of zeros."""
    aligned, most = sizes.source == "aligned", sizes.source_positions
    if aligned:
        given = [list(source[1:-1][:most]) for source in sources]
    else:
        given = [_within(list(source), most) for source in sources]
    longest = max(1, max(map(len, given), default=1))
    slots = longest if aligned else sizes.target_slots
    absent = absent_id(sizes.vocab_size)
    ids = np.full((len(given), slots + longest), absent, dtype=np.int64)
    for row, source in enumerate(given):
        ids[row, slots : slots + len(source)] = source
    return ids, np.zeros_like(ids)


def _within(source: list[int], most: int) -> list[int]:
    """A source cut before its [SEP] to so many tokens."""
    return source if len(source) <= most else [*source[: most - 1], source[-1]]
