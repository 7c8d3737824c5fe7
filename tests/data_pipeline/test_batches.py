"""Batches: the layout of many rows at once, and an order that needs no state."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlmone_fast.data import layout
from dlmone_fast.data.batches import (
    BatchStream,
    batch,
    batches_in_order,
    epoch_order,
    source_batch,
    without_sources,
)
from dlmone_fast.data.cache import TokenCache, open_or_build
from dlmone_fast.errors import PromptError, UsageError
from dlmone_fast.kernels.noise import Stream
from dlmone_fast.tokenizer import Tokenizer

WORDS = [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(6) for j in range(6)]
TOKENIZER = Tokenizer.from_words(WORDS)
ROWS = 64


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    folder = tmp_path_factory.mktemp("batches")
    lines = [
        json.dumps(
            {
                "src": " ".join(WORDS[: 1 + i * 7 % 30]),
                "trg": " ".join(WORDS[-(1 + i * 11 % 30) :]),
            }
        )
        for i in range(ROWS)
    ]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return open_or_build(folder / "train.jsonl", TOKENIZER, folder / "cache")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=40),
    seq_len=st.integers(16, 80),
    source_positions=st.sampled_from([0, 3, 9, 14]),
)
@example(rows=[0, 9], seq_len=5, source_positions=0)
def test_a_batch_is_the_layout_of_each_row(
    cache: TokenCache, rows: list[int], seq_len: int, source_positions: int
) -> None:
    ids, mask = batch(cache, rows, seq_len, TOKENIZER, source_positions)
    assert ids.dtype == mask.dtype == torch.int64
    special = {
        "sep_id": TOKENIZER.sep_id, "pad_id": TOKENIZER.pad_id, "cls_id": TOKENIZER.cls_id
    }  # fmt: skip
    for row, row_ids, row_mask in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        expected = layout(*cache.pair(row), seq_len, **special, source_positions=source_positions)
        assert expected == (row_ids, row_mask)


def test_both_directions_lay_out_every_row_twice(cache: TokenCache) -> None:
    both = replace(cache, both_directions=True)
    assert len(both) == 2 * ROWS
    sep, pad, cls = TOKENIZER.sep_id, TOKENIZER.pad_id, TOKENIZER.cls_id
    for rows in (range(2 * ROWS), range(ROWS, ROWS + 3), [5, ROWS + 5, 4], range(3)):
        ids, mask = batch(both, list(rows), 24, TOKENIZER)
        for row, row_ids, row_mask in zip(rows, ids.tolist(), mask.tolist(), strict=True):
            pair = cache.pair(row % ROWS)
            assert both.pair(row) == (pair[::-1] if row >= ROWS else pair)
            sides = pair[::-1] if row >= ROWS else pair
            assert (row_ids, row_mask) == layout(*sides, 24, sep_id=sep, pad_id=pad, cls_id=cls)
    with pytest.raises(UsageError, match="rows"):
        batch(both, [2 * ROWS], 24, TOKENIZER)
    stream = BatchStream(both, 5, 2 * ROWS)
    assert sorted(stream.batch_rows(0)) == list(range(2 * ROWS))


@pytest.mark.parametrize("source_positions", [0, 14])
@pytest.mark.parametrize("seq_len", [24, 80])
def test_a_dropped_source_is_laid_out_as_padding(
    cache: TokenCache, seq_len: int, source_positions: int
) -> None:
    ids, _ = batch(cache, list(range(12)), seq_len, TOKENIZER, source_positions)
    sep, pad, cls = TOKENIZER.sep_id, TOKENIZER.pad_id, TOKENIZER.cls_id
    found = without_sources(ids, torch.tensor([2, 7, 8]), pad, sep)
    for row in range(12):
        source, target = cache.pair(row)
        if row in (2, 7, 8):
            source = [cls, *[pad] * (len(source) - 2), sep]
        expected, _ = layout(
            source, target, seq_len, sep_id=sep, pad_id=pad, cls_id=cls,
            source_positions=source_positions,
        )  # fmt: skip
        assert found[row].tolist() == expected
    nothing = torch.tensor([], dtype=torch.int64)
    assert torch.equal(without_sources(ids, nothing, pad, sep), ids)


def test_rows_may_come_as_any_kind_of_integers(cache: TokenCache) -> None:
    expected = batch(cache, [3, 60, 3], 32, TOKENIZER)[0]
    for rows in (np.array([3, 60, 3]), torch.tensor([3, 60, 3])):
        assert torch.equal(batch(cache, rows, 32, TOKENIZER)[0], expected)


@pytest.mark.parametrize("rows", [[], [-1], [ROWS], [0.5], [[1]]])
def test_rows_outside_the_cache_raise(cache: TokenCache, rows: list[int]) -> None:
    with pytest.raises(UsageError, match="rows"):
        batch(cache, rows, 32, TOKENIZER)


def test_source_batches_count_what_they_truncate() -> None:
    encoded = TOKENIZER.encode([" ".join(WORDS[:3]), " ".join(WORDS[:9])])
    ids, mask, truncated = source_batch(encoded, 20, TOKENIZER, on_overflow="truncate")
    assert truncated == [False, True]
    assert mask.sum(1).tolist() == [20 - 6, 20 - 11]
    assert ids[1, :11].tolist() == encoded[1][:9] + [TOKENIZER.sep_id] * 2
    with pytest.raises(PromptError, match="the limit is 10"):
        source_batch(encoded, 20, TOKENIZER)
    assert source_batch([], 20, TOKENIZER)[0].shape == (0, 20)


@pytest.mark.parametrize("size", [1, 7, 32, ROWS, 100, 3 * ROWS + 5])
def test_epochs_follow_each_other_without_loss(size: int) -> None:
    stream = BatchStream(range(ROWS), seed=5, batch_size=size)
    steps = -(-4 * ROWS // size)
    walked = np.concatenate([stream.batch_rows(step) for step in range(steps)])
    assert all(len(stream.batch_rows(step)) == size for step in range(steps))
    for epoch in range(4):
        part = walked[epoch * ROWS : (epoch + 1) * ROWS]
        assert sorted(part) == list(range(ROWS))
        assert part.tolist() == epoch_order(5, epoch, ROWS).tolist()


def test_batches_are_a_function_of_seed_and_step_alone() -> None:
    walked = BatchStream(range(ROWS), 5, 10)
    expected = [walked.batch_rows(step).tolist() for step in range(30)]
    for step in (29, 3, 17, 6, 0):
        assert BatchStream(range(ROWS), 5, 10).batch_rows(step).tolist() == expected[step]
        assert walked.batch_rows(step).tolist() == expected[step]
    assert BatchStream(range(ROWS), 6, 10).batch_rows(0).tolist() != expected[0]


def test_streams_are_independent_draws() -> None:
    rows = range(4096)
    real, fake = (BatchStream(rows, 0, 4096, s) for s in (Stream.BATCH_REAL, Stream.BATCH_FAKE))
    same = np.mean(real.batch_rows(0) == fake.batch_rows(0))
    assert same < 0.01
    correlation = np.corrcoef(real.batch_rows(0), fake.batch_rows(0))[0, 1]
    assert abs(correlation) < 0.08


def test_evaluation_goes_in_order_with_a_ragged_end() -> None:
    assert [part.tolist() for part in batches_in_order(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    with pytest.raises(UsageError, match="batch_size"):
        list(batches_in_order(7, 0))


@pytest.mark.parametrize("size", [0, -1, 2**30, 2.0])
def test_impossible_batch_sizes_raise(size: int) -> None:
    with pytest.raises(UsageError, match="batch_size"):
        BatchStream(range(ROWS), 0, size)


def test_a_stream_wants_rows_and_a_step() -> None:
    with pytest.raises(UsageError, match="at least one row"):
        BatchStream([], 0, 4)
    with pytest.raises(UsageError, match="step"):
        BatchStream(range(ROWS), 0, 4).batch_rows(-1)


def test_layout_cache_and_grammar_need_no_torch() -> None:
    code = (
        "import sys, dlmone_fast.data, dlmone_fast.data.cache, dlmone_fast.tasks.grammar;"
        "sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )


def test_a_far_step_of_a_short_stream_has_an_order() -> None:
    """Of which a batch holds several epochs, beyond what one counter word numbers."""
    stream = BatchStream(range(3), 5, 8)
    step = 1 << 31
    epoch, start = divmod(8 * step, 3)
    assert epoch > 1 << 32
    orders = torch.cat([epoch_order(5, (epoch + i) % (1 << 32), 3) for i in range(4)])
    assert stream.batch_rows(step).tolist() == orders[start : start + 8].tolist()
