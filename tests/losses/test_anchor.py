"""The anchor loss against its formula in plain torch."""

from __future__ import annotations

import pytest
import torch

from dlmone_fast.config import ModelConfig
from dlmone_fast.losses.anchor import anchor_loss
from dlmone_fast.networks import TokenEmbedding

MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
WEIGHTS = torch.tensor([[1, 1, 1, 0.25], [1, 1, 1, 0.0], [1, 1, 1, 0.0]])


def tokens() -> TokenEmbedding:
    torch.manual_seed(1)
    made = TokenEmbedding(
        ModelConfig(vocab_size=11, embedding_dim=6, normalize_embedding=True, noise_scale=2.0)
    )
    made.bias.data.normal_()
    return made.requires_grad_(False)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mse_weight", [0.0, 0.7])
def test_the_loss_is_its_formula_and_its_gradient_that_of_the_formula(
    weighted: bool, mse_weight: float
) -> None:
    made = tokens()
    x = torch.randn(3, 4, 6, requires_grad=True)
    ids = torch.randint(0, 11, (3, 4))
    weights = WEIGHTS if weighted else None
    table = made.table()
    found = anchor_loss(made, table, x, ids, MASK, weights, mse_weight)
    (gradient,) = torch.autograd.grad(found.sum(), x)

    logits = x.double() @ table.double().T + made.bias.double()
    nll = -logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    square = (x.double() - table[ids].double()).square().sum(-1) / 6
    w = (WEIGHTS if weighted else torch.ones(3, 4)) * MASK
    expected = (w * (nll + mse_weight * 4 * square)).sum(1)
    expected = expected / torch.where(w.sum(1) > 0, w.sum(1), 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    if weighted:
        assert float(found[2].detach()) == 0.0
