"""Loss, vocabulary, batches and scores."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dlmone_fast.autoregressive.batches import Pairs
from dlmone_fast.autoregressive.layers import Dropout, KeysValues, attend
from dlmone_fast.autoregressive.loss import smoothed_cross_entropy
from dlmone_fast.autoregressive.scoring import edit_distance, score_symbols
from dlmone_fast.autoregressive.vocabulary import Symbols, read_vocabulary
from dlmone_fast.data.rows import Row
from dlmone_fast.errors import ModelFileError, PromptError


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_torchs(smoothing: float):
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * 4
    wanted = torch.arange(7)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = smoothed_cross_entropy(ours, wanted, smoothing)
    expected = F.cross_entropy(theirs, wanted, label_smoothing=smoothing)
    (3 * found).backward()
    (3 * expected).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


def test_loss_of_bf16_scores_is_as_exact_as_they_are():
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)).bfloat16() * 3
    wanted = torch.arange(64)
    exact = F.cross_entropy(logits.double(), wanted, label_smoothing=0.05)
    assert smoothed_cross_entropy(logits, wanted, 0.05).item() == pytest.approx(
        exact.item(), rel=1e-3
    )


def test_attention_is_torchs():
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 1, 5)
    mask[1, ..., 3:] = -math.inf
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = attend(q, KeysValues(k, v), mask)
    assert torch.allclose(found, expected.transpose(1, 2).flatten(2), atol=1e-6)


def test_dropout_keeps_the_mean_and_repeats_from_a_seed():
    layer = Dropout(0.2)
    x = torch.ones(1000, 33)
    torch.manual_seed(0)
    first = layer(x)
    torch.manual_seed(0)
    assert torch.equal(first, layer(x))
    assert (first == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert first.mean().item() == pytest.approx(1, abs=0.01)
    assert layer.eval()(x) is x


def test_batches_are_a_seeded_order_of_similar_lengths():
    lengths = [2 + i % 7 for i in range(500)]
    pairs = Pairs([([5] * n, [1, *[4] * n, 2]) for n in lengths], pad_id=0)
    order = pairs.order(3, 0, 16)
    assert Counter(np.concatenate(order).tolist()) == Counter(range(500))
    assert len(order) == pairs.steps_of_epoch(16)
    again, later = pairs.order(3, 0, 16), pairs.order(3, 1, 16)
    assert all(np.array_equal(a, b) for a, b in zip(order, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(order, later, strict=False))
    spread = [np.ptp(np.array(lengths)[rows]) for rows in order]
    assert max(spread) <= 1


def test_a_batch_is_cut_to_its_longest_and_wants_no_padding():
    pairs = Pairs([([7, 2], [1, 5, 2]), ([8, 9, 2], [1, 6, 7, 2]), ([4] * 9, [1, 2])], pad_id=0)
    batch = pairs.batch(np.array([0, 1]))
    assert batch.source.tolist() == [[7, 2, 0], [8, 9, 2]]
    assert batch.padded.tolist() == [[False, False, True], [False] * 3]
    assert batch.target.tolist() == [[1, 5, 2], [1, 6, 7]]
    assert batch.wanted.tolist() == [5, 2, 6, 7, 2]
    assert batch.places.tolist() == [0, 1, 3, 4, 5]
    same = pairs.batch(np.array([1, 1]))
    assert same.padded is None
    assert same.places is None


def test_symbols_spell_and_name_what_they_do_not_know(tmp_path: Path):
    symbols = Symbols.learn([("Abc", "ah b"), ("cab", "k ah b")])
    assert symbols.characters == ("a", "b", "c")
    (ids,) = symbols.sources([" CAB "])
    assert len(ids) == 4
    assert ids[-1] == symbols.end_id
    with pytest.raises(PromptError, match=r"texts\[1\]: 'z', '9' is not among"):
        symbols.sources(["a", "z9a"])
    with pytest.raises(PromptError, match="is empty"):
        symbols.sources(["  "])
    pairs, dropped = symbols.pairs([("ab", "b ah"), ("ab", "zh"), ("az", "b")])
    assert dropped == 2
    assert pairs[0] is not None
    assert symbols.text(pairs[0][1]) == "b ah"
    (tmp_path / "symbols.json").write_text(symbols.file_text(), encoding="utf-8")
    assert read_vocabulary(tmp_path, "symbols").hash == symbols.hash
    (tmp_path / "symbols.json").write_text('{"characters": ["ab"]}', encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"symbols\.json"):
        read_vocabulary(tmp_path, "symbols")


def test_error_rates_count_the_closest_of_all_answers():
    rows = [
        Row("a", "ah b", 1, ("ah b", "ey b iy")),
        Row("b", "b iy", 2),
        Row("c", "s iy", 3, ("k",)),
    ]
    scores = score_symbols(["ey b iy", "b", "s iy"], rows)
    assert scores["wer"] == pytest.approx(1 / 3)
    assert scores["per"] == pytest.approx(1 / (3 + 2 + 2))


@pytest.mark.parametrize(
    ("a", "b", "edits"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)]
)
def test_edit_distance(a: str, b: str, edits: int):
    assert edit_distance(list(a), list(b)) == edits
