"""DiffuSeq's sequence layout (arXiv 2210.08933, `text_datasets.py` of its code).

    ids   [CLS] source [SEP] [SEP] [CLS] target [SEP] [PAD] …
    mask    0     0      0     0     1     1      1     1   …

The mask is 0 on what is given and 1 on what is generated, the padding included. With
`source_positions` N > 0, which is ours, [PAD] fills the source's side to N positions, so that the
target always begins at N: what belongs together then always stands equally far apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from dlmone_fast.checks import as_whole, is_whole
from dlmone_fast.config.room import SEPARATORS, default_source_limit, largest_source
from dlmone_fast.errors import PromptError, UsageError

BERT_PAD_ID = 0
BERT_CLS_ID = 101
BERT_SEP_ID = 102

# One id, [CLS], is left of each side:
MIN_SEQ_LEN = SEPARATORS + 2
MAX_SEQ_LEN = 65_536
# [CLS] [SEP] [SEP] of a source, [CLS] [SEP] of a target.
MIN_SOURCE, MIN_TARGET = 3, 2


def layout(
    src_ids: Sequence[int],
    trg_ids: Sequence[int],
    seq_len: int,
    *,
    sep_id: int = BERT_SEP_ID,
    pad_id: int = BERT_PAD_ID,
    cls_id: int = BERT_CLS_ID,
    source_positions: int = 0,
) -> tuple[list[int], list[int]]:
    """Lay out one pair as DiffuSeq does; return (input_ids, input_mask), each `seq_len` ints.

    Each side comes with its own [CLS] and [SEP]. A pair that is too long loses the last token
    before [SEP] of the longer side, again and again (of both sides where they are equally
    long); with `source_positions` each side is cut to its own room. Raise UsageError for a side
    without its [CLS] and [SEP], a `seq_len` below 5, or `source_positions` that leave no room.
    """
    check_seq_len(seq_len, source_positions)
    src_ids, trg_ids = list(map(int, src_ids)), list(map(int, trg_ids))
    _check_side("src_ids", src_ids, cls_id, sep_id)
    _check_side("trg_ids", trg_ids, cls_id, sep_id)
    lengths = len(src_ids) - 1, len(trg_ids) - 1
    src_kept, trg_kept = kept_lengths(*lengths, seq_len, source_positions)
    given = source_positions or src_kept + 2
    source = [*src_ids[:src_kept], sep_id, sep_id, *[pad_id] * (given - src_kept - 2)]
    ids = [*source, *trg_ids[:trg_kept], sep_id]
    return (
        ids + [pad_id] * (seq_len - len(ids)),
        [0] * given + [1] * (seq_len - given),
    )


def layout_source(
    src_ids: Sequence[int],
    seq_len: int,
    max_source_tokens: int | None = None,
    *,
    on_overflow: Literal["error", "truncate"] = "error",
    sep_id: int = BERT_SEP_ID,
    pad_id: int = BERT_PAD_ID,
    cls_id: int = BERT_CLS_ID,
    source_positions: int = 0,
    name: str = "source",
) -> tuple[list[int], list[int]]:
    """Lay out a source alone, for generation; every position behind it is target (mask 1).

    `max_source_tokens` (default seq_len // 2, or what `source_positions` hold) counts the source's
    ids with [CLS] and [SEP]; the second [SEP] comes on top. A longer source raises PromptError, or
    loses its last tokens before [SEP] with `on_overflow="truncate"`. Errors call it `name`.
    """
    limit = source_limit(seq_len, max_source_tokens, source_positions)
    if on_overflow not in ("error", "truncate"):
        raise UsageError(f"on_overflow: expected 'error' or 'truncate', got {on_overflow!r}")
    _check_side("src_ids", src_ids, cls_id, sep_id)
    if len(src_ids) > limit and on_overflow == "error":
        raise PromptError(
            f"{name}: {len(src_ids)} tokens with [CLS] and [SEP], the limit is {limit}; shorten "
            "it or pass on_overflow='truncate'"
        )
    ids = [*src_ids[: min(len(src_ids), limit) - 1], sep_id, sep_id]
    given = source_positions or len(ids)
    return ids + [pad_id] * (seq_len - len(ids)), [0] * given + [1] * (seq_len - given)


def source_limit(
    seq_len: int,
    max_source_tokens: int | None,
    source_positions: int = 0,
    source: str = "joined",
) -> int:
    """Return the largest source, checked to leave at least [CLS] and [SEP] for the target."""
    check_seq_len(seq_len, source_positions)
    largest = largest_source(seq_len, source_positions, source)
    if max_source_tokens is None:
        return default_source_limit(seq_len, source_positions, source)
    if not is_whole(max_source_tokens, 2, largest):
        room = f"{source_positions} source positions" if source_positions else f"seq_len {seq_len}"
        raise UsageError(
            f"max_source_tokens: expected 2 to {largest} ({room} less room for what follows), "
            f"got {max_source_tokens!r}"
        )
    return max_source_tokens


def kept_lengths(src: int, trg: int, seq_len: int, source_positions: int = 0) -> tuple[int, int]:
    """Return how many ids of each side stay, in closed form (lengths without the final [SEP]).

    Popping from the longer side until both fit ends either above the shorter side's length,
    which is then untouched, or with both sides equally long.
    """
    if source_positions:
        return min(src, source_positions - 2), min(trg, seq_len - source_positions - 1)
    room = seq_len - SEPARATORS
    if src + trg <= room:
        return src, trg
    shorter = min(src, trg)
    if 2 * shorter > room:
        return room // 2, room // 2
    return (shorter, room - shorter) if src < trg else (room - shorter, shorter)


def check_seq_len(seq_len: int, source_positions: int = 0) -> None:
    """Raise UsageError for a sequence that no pair can be laid out in."""
    if not is_whole(seq_len, MIN_SEQ_LEN, MAX_SEQ_LEN):
        raise UsageError(
            f"seq_len: expected {MIN_SEQ_LEN} to {MAX_SEQ_LEN} (three [SEP] and two [CLS] are "
            f"always there), got {seq_len!r}"
        )
    room = seq_len - MIN_TARGET
    if as_whole(source_positions) != 0 and not is_whole(source_positions, MIN_SOURCE, room):
        raise UsageError(
            f"source_positions: expected 0, or {MIN_SOURCE} to {room} (room for a "
            f"target within seq_len {seq_len}), got {source_positions!r}"
        )


def _check_side(name: str, ids: Sequence[int], cls_id: int, sep_id: int) -> None:
    if len(ids) < 2 or ids[0] != cls_id or ids[-1] != sep_id:
        ends = f"{ids[0]} … {ids[-1]}" if len(ids) else "nothing"
        raise UsageError(
            f"{name}: expected ids from [CLS] ({cls_id}) to [SEP] ({sep_id}), got {ends}; pass "
            "what Tokenizer.encode gives, and the tokenizer's own cls_id and sep_id"
        )
