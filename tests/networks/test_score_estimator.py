"""ψ: the teacher's backbone with a discriminator that starts neutral and can see something."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dlmone_fast.config import ModelConfig
from dlmone_fast.networks import Backbone, ScoreEstimator


def backbone(norm: str) -> Any:
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=8,
        embedding_dim=8,
        time_dim=8,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        ffn_size=128,
        norm=norm,
    )
    return Backbone(config).eval()


@pytest.fixture(params=["post", "pre"])
def net(request: pytest.FixtureRequest) -> Any:
    return backbone(request.param)


X = torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(0))
TIME = torch.tensor([1.0, 300.0, 900.0])


def test_the_head_is_zero_at_the_start(net: Any) -> None:
    score = ScoreEstimator(copy.deepcopy(net)).eval()
    x0, logits = score(X, TIME)
    assert logits.shape == (3, 10)
    assert bool((logits == 0).all())
    assert torch.equal(x0, net(X, TIME))
    logits.sum().backward()
    gradient = score.head.weight.grad
    assert gradient is not None
    assert bool(gradient.any())


def test_the_head_reads_the_last_hidden_state_token_by_token(net: Any) -> None:
    score = ScoreEstimator(net).eval()
    torch.nn.init.normal_(score.head.weight)
    hidden, _ = net.features(X, TIME)
    expected = torch.einsum("blh,h->bl", hidden, score.head.weight[0])
    torch.testing.assert_close(score(X, TIME)[1], expected)


def spread(values: Tensor) -> float:
    return float(values.detach().std())


def test_the_channel_mean_reads_features_that_carry_signal(net: Any) -> None:
    score = ScoreEstimator(net, "channel_mean").eval()
    assert not hasattr(score, "head")
    hidden, residual = net.features(X, TIME)
    logits = score(X, TIME)[1]
    torch.testing.assert_close(logits, residual.mean(-1))
    # A LayerNorm output has mean 0 by construction: what a literal channel mean would read.
    assert spread(hidden.mean(-1)) < 1e-6
    assert spread(logits) > 1e-2
    (gradient,) = torch.autograd.grad(logits.sum(), net.blocks[0].ffn_out.weight)
    assert float(gradient.norm()) > 1e-2
