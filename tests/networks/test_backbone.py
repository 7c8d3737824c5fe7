"""The backbone against an independent fp64 restatement, in both places of LayerNorm."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dlmone_fast.config import ModelConfig
from dlmone_fast.networks import Backbone
from dlmone_fast.networks.embedding import time_features
from dlmone_fast.networks.layers import Attention, Block

SMALL = ModelConfig(
    seq_len=12,
    vocab_size=40,
    embedding_dim=6,
    time_dim=8,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    ffn_size=24,
    max_positions=20,
)


def network(norm: str, dropout: float = 0.1) -> Any:
    torch.manual_seed(3)
    return Backbone(replace(SMALL, norm=norm, dropout=dropout)).eval()


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator)


def attend(layer: Attention, h: Tensor, heads: int) -> Tensor:
    """Separate query, key and value products, head by head, with an explicit softmax."""
    weights, biases = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
    q, k, v = (
        (h @ w.T + b).unflatten(-1, (heads, -1)) for w, b in zip(weights, biases, strict=True)
    )
    scores = torch.einsum("bqnc,bknc->bnqk", q, k) / math.sqrt(q.shape[-1])
    shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
    mixed = torch.einsum("bnqk,bknc->bqnc", shares, v).flatten(2)
    return mixed @ layer.output.weight.T + layer.output.bias


def normalised(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt() * weight + bias


def feed_forward(block: Block, h: Tensor) -> Tensor:
    inner = h @ block.ffn_in.weight.T + block.ffn_in.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return inner @ block.ffn_out.weight.T + block.ffn_out.bias


def restated(net: Any, x: Tensor, time: Tensor, norm: str) -> Tensor:
    angles = time[:, None] * 10_000.0 ** -(torch.arange(4).double() / 4)
    features = torch.cat([angles.cos(), angles.sin()], 1)
    t = net.time_mlp[2](F.silu(net.time_mlp[0](features)))
    h = net.input_projection[2](torch.tanh(net.input_projection[0](x)))
    h = h + net.position.weight[: x.shape[1]] + t[:, None]
    h = normalised(h, net.input_norm.weight, net.input_norm.bias)
    for block in net.blocks:
        first = block.attention_norm.weight, block.attention_norm.bias
        second = block.ffn_norm.weight, block.ffn_norm.bias
        if norm == "post":
            h = normalised(h + attend(block.attention, h, 4), *first)
            h = normalised(h + feed_forward(block, h), *second)
        else:
            h = h + attend(block.attention, normalised(h, *first), 4)
            h = h + feed_forward(block, normalised(h, *second))
    if norm == "pre":
        h = normalised(h, net.output_norm.weight, net.output_norm.bias)
    return net.output_projection[2](torch.tanh(net.output_projection[0](h)))


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_backbone_is_its_restatement(norm: str) -> None:
    net = network(norm)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, time = draw(2, 12, 6), torch.tensor([0.0, 745.5])
    found = net(x, time)
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    exact = restated(copy.deepcopy(net).double(), x.double(), time.double(), norm)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5)


def test_one_product_gives_separate_query_key_and_value() -> None:
    layer = network("post").blocks[0].attention.double()
    h = draw(3, 7, 16).double()
    torch.testing.assert_close(layer(h), attend(layer, h, 4), rtol=1e-12, atol=1e-12)


def test_every_position_sees_every_other() -> None:
    net, x = network("post"), draw(1, 12, 6)
    time = torch.tensor([10.0])
    for changed in (0, 11):
        other = x.clone()
        other[:, changed] += 1
        assert bool((net(x, time) != net(other, time)).any(-1).all())


def test_positions_are_told_apart() -> None:
    net, x = network("pre"), draw(1, 12, 6)
    time = torch.tensor([10.0])
    flipped = net(x.flip(1), time).flip(1)
    assert (flipped - net(x, time)).abs().max() > 1e-3


def test_post_norm_ends_normalised_and_pre_norm_keeps_the_residual() -> None:
    time = torch.tensor([5.0, 6.0])
    hidden, residual = network("post").features(draw(2, 12, 6), time)
    assert hidden.shape == residual.shape == (2, 12, 16)
    torch.testing.assert_close(hidden.var(-1, correction=0), torch.ones(2, 12))
    pre = network("pre")
    with torch.no_grad():
        for block in pre.blocks:
            for layer in (block.attention.output, block.ffn_out):
                layer.weight.zero_()
                layer.bias.zero_()
    hidden, residual = pre.features(draw(2, 12, 6), time)
    # Blocks that add nothing leave the normalised input, which the last norm does not change.
    torch.testing.assert_close(hidden, residual)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_dropout_is_off_in_evaluation_and_on_in_training(norm: str) -> None:
    net, x, time = network(norm), draw(2, 12, 6), torch.tensor([5.0, 6.0])
    assert torch.equal(net(x, time), net(x, time))
    net.train()
    assert not torch.equal(net(x, time), net(x, time))


def test_time_features_start_with_cosines() -> None:
    features = time_features(torch.tensor([0.0, 745.0]), 8)
    assert features[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    angles = [745.0 * 10_000 ** (-i / 4) for i in range(4)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert features[1].tolist() == pytest.approx(expected, abs=1e-4)


def test_time_features_stay_float32() -> None:
    exact = time_features(torch.tensor([745.5]), 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(time_features(torch.tensor([745.5]), 128), exact)
    assert exact.dtype == torch.float32


def self_conditioned(norm: str = "pre") -> Any:
    torch.manual_seed(3)
    return Backbone(replace(SMALL, norm=norm, self_conditioning=True)).eval()


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_self_conditioning_starts_as_nothing(norm: str) -> None:
    plain, conditioned = network(norm), self_conditioned(norm)
    extra = set(conditioned.state_dict()) - set(plain.state_dict())
    assert extra == {"estimate_projection.weight"}
    for name, value in plain.state_dict().items():
        assert torch.equal(conditioned.state_dict()[name], value), name
    x_t, time, estimate = draw(2, 12, 6), torch.tensor([3.0, 700.0]), draw(2, 12, 6) + 1
    expected = plain(x_t, time)
    assert torch.equal(conditioned(x_t, time), expected)
    torch.testing.assert_close(conditioned(x_t, time, estimate), expected)


@torch.no_grad()
def test_an_estimate_is_added_beside_the_input_projection() -> None:
    net = self_conditioned()
    torch.nn.init.normal_(net.estimate_projection.weight)
    x_t, time, estimate = draw(2, 12, 6), torch.tensor([3.0, 700.0]), draw(2, 12, 6) + 1
    found = net(x_t, time, estimate)
    torch.testing.assert_close(net(x_t, time, torch.zeros_like(estimate)), net(x_t, time))
    # The same sum, with the estimate's part moved into what each position adds.
    shifted = copy.deepcopy(net)
    for row in range(2):
        part = estimate[row] @ net.estimate_projection.weight.T
        shifted.position.weight[:12] = net.position.weight[:12] + part
        alone = shifted(x_t[row : row + 1], time[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-5)
