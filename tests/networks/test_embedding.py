"""The embedding table, its normalisation and noise scale, and the decoder tied to it."""

from __future__ import annotations

import math

import pytest
import torch

from dlmone_fast.config import ModelConfig
from dlmone_fast.networks import TokenEmbedding


def tokens(normalize: bool, noise_scale: float) -> TokenEmbedding:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=11, embedding_dim=6, normalize_embedding=normalize, noise_scale=noise_scale
    )
    module = TokenEmbedding(config)
    torch.nn.init.normal_(module.bias)
    return module


@pytest.mark.parametrize("noise_scale", [1.0, 2.0, 0.5])
def test_normalised_rows_have_norm_sqrt_d_over_f(noise_scale: float) -> None:
    module = tokens(True, noise_scale)
    table = module.table()
    expected = torch.full((11,), math.sqrt(6) / noise_scale)
    torch.testing.assert_close(table.norm(dim=1), expected)
    cosines = torch.nn.functional.cosine_similarity(table, module.weight)
    torch.testing.assert_close(cosines, torch.ones(11))


def test_diffuseq_has_the_stored_table_itself() -> None:
    module = tokens(False, 1.0)
    assert module.table() is module.weight
    torch.testing.assert_close(tokens(False, 4.0).table(), module.weight / 4)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_decoder_is_tied_to_the_table(normalize: bool) -> None:
    module = tokens(normalize, 2.0)
    ids = torch.tensor([[3, 0, 10]])
    embedded = module(ids)
    assert torch.equal(embedded, module.table()[ids])
    h = torch.randn(1, 3, 6)
    torch.testing.assert_close(module.logits(h), h @ module.table().T + module.bias)
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]


def test_both_roles_of_the_table_train_the_one_weight() -> None:
    module = tokens(True, 2.0)
    module(torch.tensor([[3]])).sum().backward()
    of_embedding = module.weight.grad
    assert of_embedding is not None
    assert of_embedding.abs().sum(1).nonzero().flatten().tolist() == [3]
    module.weight.grad = None
    module.logits(torch.ones(1, 6)).square().sum().backward()
    of_decoder: torch.Tensor | None = module.weight.grad
    assert of_decoder is not None
    assert bool((of_decoder.abs().sum(1) > 0).all())
