"""DiffuSeq's layout: the golden rows, the original's popping loop, and inputs that do not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmone_fast.data import layout, layout_source
from dlmone_fast.errors import PromptError, UsageError
from dlmone_fast.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
GOLDEN = Path(os.environ.get("DLMONE_GOLDEN_DIR", ROOT / "../shared/golden"))
DATA = Path(os.environ.get("DLMONE_DATA_DIR", ROOT / "../shared/data"))
CLS, SEP = 101, 102


def _side(length: int, first: int) -> list[int]:
    return [CLS, *range(first, first + length - 2), SEP]


def _by_popping(
    src_ids: list[int], trg_ids: list[int], seq_len: int
) -> tuple[list[int], list[int]]:
    """The rule as the paper's code states it, one token at a time."""
    src, trg = src_ids[:-1], trg_ids[:-1]
    while len(src) + len(trg) > seq_len - 3:
        longer = [side for side in (src, trg) if len(side) == max(len(src), len(trg))]
        for side in longer:
            side.pop()
    ids = [*src, SEP, SEP, *trg, SEP]
    return (
        ids + [0] * (seq_len - len(ids)),
        [0] * (len(src) + 2) + [1] * (seq_len - len(src) - 2),
    )


def test_golden_rows_are_met_exactly() -> None:
    path, vocab = GOLDEN / "layout-sample.json", DATA / "bert-base-uncased" / "vocab.txt"
    if not (path.is_file() and vocab.is_file()):
        pytest.skip(f"needs {path} and {vocab} (DLMONE_GOLDEN_DIR, DLMONE_DATA_DIR)")
    tokenizer = Tokenizer.from_vocab_file(vocab)
    rows = json.loads(path.read_text("utf-8"))
    assert len(rows) == 50
    for row in rows:
        src, trg = tokenizer.encode([row["src"], row["trg"]])
        assert layout(src, trg, row["seq_len"]) == (row["input_ids"], row["input_mask"])


def test_a_pair_that_fits_is_padded() -> None:
    ids, mask = layout([CLS, 7, 8, SEP], [CLS, 9, SEP], 10)
    assert ids == [CLS, 7, 8, SEP, SEP, CLS, 9, SEP, 0, 0]
    assert mask == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(5, 70))
def test_truncation_equals_popping_from_the_longer_side(src: int, trg: int, seq_len: int) -> None:
    sides = _side(src, 1000), _side(trg, 2000)
    assert layout(*sides, seq_len) == _by_popping(*sides, seq_len)


def test_the_arguments_are_left_as_they_were() -> None:
    src, trg = _side(9, 1000), _side(9, 2000)
    layout(src, trg, 8)
    assert (src, trg) == (_side(9, 1000), _side(9, 2000))


@pytest.mark.parametrize("seq_len", [4, 0, -1, 10**9, 8.0, None])
def test_impossible_lengths_raise(seq_len: int) -> None:
    with pytest.raises(UsageError, match="seq_len"):
        layout([CLS, SEP], [CLS, SEP], seq_len)


@pytest.mark.parametrize("ids", [[], [CLS], [CLS, 7], [7, SEP], [2, 7, 3]])
def test_sides_without_their_special_tokens_raise(ids: list[int]) -> None:
    with pytest.raises(UsageError, match="trg_ids"):
        layout([CLS, SEP], ids, 16)
    with pytest.raises(UsageError, match="src_ids"):
        layout(ids, [CLS, SEP], 16)


def test_other_vocabularies_bring_their_own_special_ids() -> None:
    ids, _ = layout([2, 9, 3], [2, 3], 8, sep_id=3, pad_id=4, cls_id=2)
    assert ids == [2, 9, 3, 3, 2, 3, 4, 4]


def test_a_source_alone_leaves_the_rest_to_the_target() -> None:
    ids, mask = layout_source(_side(4, 1000), 10)
    assert ids == [CLS, 1000, 1001, SEP, SEP, 0, 0, 0, 0, 0]
    assert mask == [0] * 5 + [1] * 5


def test_a_source_alone_agrees_with_the_pair_layout() -> None:
    src = _side(6, 1000)
    pair_ids, pair_mask = layout(src, _side(3, 2000), 16)
    ids, mask = layout_source(src, 16)
    assert mask == pair_mask
    assert ids[:7] == pair_ids[:7]


def test_a_long_source_raises_or_is_cut_before_its_separator() -> None:
    with pytest.raises(PromptError, match=r"9 tokens .* the limit is 8"):
        layout_source(_side(9, 1000), 16)
    ids, mask = layout_source(_side(9, 1000), 16, on_overflow="truncate")
    assert ids[:9] == [CLS, *range(1000, 1006), SEP, SEP]
    assert mask == [0] * 9 + [1] * 7
    assert layout_source(_side(9, 1000), 16, 13)[1] == [0] * 10 + [1] * 6


@pytest.mark.parametrize("limit", [1, 14, -3, 2.0])
def test_source_limits_must_leave_room_for_a_target(limit: int) -> None:
    with pytest.raises(UsageError, match="max_source_tokens"):
        layout_source(_side(3, 1000), 16, limit)


def test_unknown_overflow_rules_raise() -> None:
    with pytest.raises(UsageError, match="on_overflow"):
        layout_source(_side(3, 1000), 16, on_overflow="ignore")  # type: ignore[arg-type]


def test_ids_may_be_numbers_of_other_libraries():
    import numpy as np

    src, trg = [101, 7, 8, 102], [101, 9, 102]
    ids, mask = layout(np.array(src), np.array(trg), 12)
    assert (ids, mask) == layout(src, trg, 12)
    assert all(type(value) is int for value in ids + mask)


def test_positions_kept_for_the_source_set_where_the_target_begins() -> None:
    ids, mask = layout([CLS, 7, SEP], [CLS, 9, 8, SEP], 12, source_positions=6)
    assert ids == [CLS, 7, SEP, SEP, 0, 0, CLS, 9, 8, SEP, 0, 0]
    assert mask == [0] * 6 + [1] * 6
    # Each side is cut to its own room.
    ids, mask = layout(_side(9, 1000), _side(9, 2000), 12, source_positions=6)
    assert ids == [CLS, 1000, 1001, 1002, SEP, SEP, CLS, 2000, 2001, 2002, 2003, SEP]
    assert mask == [0] * 6 + [1] * 6


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 20), st.integers(3, 14))
def test_a_source_in_its_own_positions_agrees_with_the_pair_layout(src: int, given: int) -> None:
    source, seq_len = _side(src, 1000), 16
    pair_ids, pair_mask = layout(source, _side(3, 2000), seq_len, source_positions=given)
    ids, mask = layout_source(source, seq_len, on_overflow="truncate", source_positions=given)
    assert mask == pair_mask == [0] * given + [1] * (seq_len - given)
    assert ids == pair_ids[:given] + [0] * (seq_len - given)


@pytest.mark.parametrize("positions", [1, 2, 15, 16])
def test_positions_without_room_for_a_target_raise(positions: int) -> None:
    with pytest.raises(UsageError, match="source_positions: expected 0, or 3 to 14"):
        layout(_side(4, 1000), _side(4, 2000), 16, source_positions=positions)
    with pytest.raises(UsageError, match="source_positions: expected 0, or 3 to 14"):
        layout_source(_side(4, 1000), 16, source_positions=positions)


def test_a_limit_beyond_the_sources_positions_raises() -> None:
    with pytest.raises(UsageError, match=r"expected 2 to 5 \(6 source positions less room"):
        layout_source(_side(4, 1000), 16, 6, source_positions=6)
    with pytest.raises(PromptError, match=r"6 tokens .* the limit is 5"):
        layout_source(_side(6, 1000), 16, source_positions=6)
