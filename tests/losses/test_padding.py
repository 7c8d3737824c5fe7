"""What counts as padding, and how much of it is let into a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from dlmone_fast.kernels.noise import Stream
from dlmone_fast.losses.padding import behind_end, thin_padding

SEP = 3
#                [CLS] s [SEP] [SEP] [CLS] t  [SEP] [PAD] [SEP] [PAD]
IDS = torch.tensor(
    [
        [2, 9, SEP, SEP, 2, 8, SEP, 0, SEP, 0],
        [2, 9, SEP, SEP, 2, 8, 7, 7, 7, 7],
        [2, SEP, SEP, SEP, 0, 0, 0, 0, 0, 0],
    ]
)
MASK = torch.tensor([[0] * 4 + [1] * 6, [0] * 4 + [1] * 6, [0] * 3 + [1] * 7])
BEHIND = torch.tensor([[0] * 7 + [1] * 3, [0] * 10, [0] * 4 + [1] * 6]).bool()


def thin(weight: float, slots: Tensor, step: int = 0, stream: Stream = Stream.FAKE_PAD) -> Tensor:
    mask, behind = MASK.repeat(len(slots) // 3, 1), BEHIND.repeat(len(slots) // 3, 1)
    return thin_padding(mask, behind, weight, 5, stream, step, slots)


def test_padding_lies_behind_the_first_separator_of_the_target() -> None:
    assert torch.equal(behind_end(IDS, MASK, SEP), BEHIND)


def test_a_weight_is_the_share_of_padding_that_is_kept() -> None:
    slots = torch.arange(3 * 2000)
    assert torch.equal(thin(0.0, slots[:3]), MASK * ~BEHIND)
    assert torch.equal(thin(1.0, slots[:3]), MASK)
    kept = thin(0.3, slots)
    behind = BEHIND.repeat(2000, 1)
    assert torch.equal(kept[~behind], MASK.repeat(2000, 1)[~behind])
    share = kept[behind].double()
    # 18,000 draws: a standard error of 0.0034.
    assert abs(float(share.mean()) - 0.3) < 0.014
    # Each position of a row is its own draw.
    rows = kept.view(2000, 3, 10)[:, 0, 7:].double()
    assert (torch.corrcoef(rows.T) - torch.eye(3)).abs().max() < 0.09


def test_a_positions_draw_depends_on_its_slot_alone() -> None:
    whole = thin(0.5, torch.arange(6))
    assert torch.equal(thin(0.5, torch.arange(3, 6)), whole[3:])
    many = torch.arange(300)
    assert not torch.equal(thin(0.5, many), thin(0.5, many, step=1))
    assert not torch.equal(thin(0.5, many), thin(0.5, many, stream=Stream.REAL_PAD))
