"""Generation rows: every prompt once per candidate, with what its noise depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlmone_fast.config import ModelConfig
from dlmone_fast.data.slots import at_full_length, trimmed
from dlmone_fast.kernels.noise import draws_of


@dataclass(frozen=True)
class Rows:
    """Rows of a call.

    Attributes:
        ids: int64 [B, L]; what stands on target positions is not read.
        mask: int64 [B, L], 0 on source positions.
        seeds, candidates: what a row's noise depends on, besides the number of the network call.
    """

    ids: Tensor
    mask: Tensor
    seeds: Sequence[int]
    candidates: Sequence[int]

    def __len__(self) -> int:
        return len(self.seeds)

    def part(self, first: int, last: int) -> Rows:
        """Some of the rows."""
        rows = slice(first, last)
        return Rows(self.ids[rows], self.mask[rows], self.seeds[rows], self.candidates[rows])

    def chosen(self, rows: Sequence[int]) -> Rows:
        """The rows of these numbers, in their order."""
        index = torch.tensor(rows, dtype=torch.int64)
        return Rows(
            self.ids[index],
            self.mask[index],
            [self.seeds[row] for row in rows],
            [self.candidates[row] for row in rows],
        )

    def cut_to_longest(self, sizes: ModelConfig) -> Rows:
        """The rows without the positions that none of their sources takes (`data/slots.py`)."""
        return Rows(*trimmed(self.ids, self.mask, sizes), self.seeds, self.candidates)

    def filled(self, sizes: ModelConfig) -> Rows:
        """The rows at the model's own length, as positions that hold nothing fill them up."""
        return Rows(*at_full_length(self.ids, self.mask, sizes), self.seeds, self.candidates)

    def batch(self, steps: int) -> RowBatch:
        """The rows as tensors alone, for `steps` network calls."""
        draws = draws_of(self.seeds, self.candidates, 0, torch.device("cpu")).unsqueeze(0)
        if steps > 1:
            draws = draws.repeat(steps, 1, 1)
            draws[:, :, 3] = torch.arange(steps).unsqueeze(1)
        return RowBatch(self.ids, self.mask, draws)


@dataclass(frozen=True)
class RowBatch:
    """Rows of one network batch, on the CPU.

    Attributes:
        ids, mask: as in `Rows`.
        draws: int64 [steps, B, 4]: what each call's noise depends on, as `draws_of` gives it.
    """

    ids: Tensor
    mask: Tensor
    draws: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, first: int, last: int) -> RowBatch:
        """Some of the rows."""
        rows = slice(first, last)
        return RowBatch(self.ids[rows], self.mask[rows], self.draws[:, rows])
