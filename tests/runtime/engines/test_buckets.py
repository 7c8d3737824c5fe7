"""Batch sizes and padding."""

from __future__ import annotations

import pytest
import torch

from dlmone_fast.errors import UsageError
from dlmone_fast.runtime.engines.buckets import BUCKETS, bucket_of, padded, parts_of


def test_a_bucket_is_the_smallest_that_holds_the_rows():
    for rows in range(1, BUCKETS[-1] + 1):
        bucket = bucket_of(rows)
        assert bucket in BUCKETS
        assert bucket // 2 < rows <= bucket
    for rows in (0, -1, BUCKETS[-1] + 1):
        with pytest.raises(UsageError, match="rows must lie in 1"):
            bucket_of(rows)


@pytest.mark.parametrize("largest", [1, 4, 512])
def test_parts_cover_the_batch_in_order(largest: int):
    for rows in (0, 1, 3, 4, 5, 512, 513, 1300):
        parts = parts_of(rows, largest)
        assert [row for first, last in parts for row in range(first, last)] == list(range(rows))
        assert all(1 <= last - first <= largest for first, last in parts)


def test_padding_repeats_the_first_row():
    x = torch.arange(6).view(3, 2)
    assert padded(x, 4).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert padded(x, 3) is x
    assert padded(x, 4, dim=1).tolist() == [[0, 1, 0, 0], [2, 3, 2, 2], [4, 5, 4, 4]]
