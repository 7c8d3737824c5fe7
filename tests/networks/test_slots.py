"""Sources in slots: what is empty is not read, and cutting it away changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from dlmone_fast.config import ModelConfig
from dlmone_fast.data.slots import absent_id, at_full_length, sources_in_slots, trimmed
from dlmone_fast.errors import BackendUnavailableError, ConfigError, PromptError
from dlmone_fast.kernels.noise import Stream, normal
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.networks import ScoreEstimator
from dlmone_fast.runtime.engines import EngineRequest, make_engine

MASKED: dict[str, Any] = {"source": "masked", "seq_len": 20, "source_positions": 12}
ALIGNED: dict[str, Any] = {"source": "aligned", "seq_len": 20, "source_positions": 10}
WINDOWED = {**ALIGNED, "source_window": 5}
KINDS = [MASKED, ALIGNED, WINDOWED]
CLS, SEP = 2, 3


def encoded(lengths: list[int]) -> list[list[int]]:
    return [[CLS, *range(5, 5 + n), SEP] for n in lengths]


def inputs(model: Denoiser, lengths: list[int], full: bool = False) -> torch.Tensor:
    """x_t of sources with pure noise in their slots."""
    sizes = model.config
    ids, mask, _ = sources_in_slots(encoded(lengths), sizes, 0)
    if full:
        ids, mask = at_full_length(ids, mask, sizes)
    rows, width = torch.arange(len(ids)), sizes.embedding_dim
    z = normal(7, Stream.GENERATION, rows, 0, ids.shape[1], width, torch.device("cpu"))
    return torch.where(mask.unsqueeze(-1) != 0, z, model.lm.tokens(ids))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("kind", KINDS, ids=["masked", "aligned", "windowed"])
def test_a_row_does_not_see_the_length_of_its_batch(kind: dict[str, Any], norm: str) -> None:
    model = tiny.denoiser(norm=norm, **kind)
    slots = model.config.slots_of
    alone = model(inputs(model, [3]), 30)
    beside = model(inputs(model, [3, 8]), 30)
    full = model(inputs(model, [3, 8], full=True), 30)
    generated = 3 if kind is not MASKED else slots(alone.shape[1])
    assert alone.shape[1] < full.shape[1]
    torch.testing.assert_close(alone[0, :generated], beside[0, :generated], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(full[0, :generated], beside[0, :generated], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=["masked", "aligned", "windowed"])
def test_the_source_is_read(kind: dict[str, Any]) -> None:
    model = tiny.denoiser(**kind)
    x = inputs(model, [4])
    other = x.clone()
    first = model.config.slots_of(x.shape[1])
    other[0, first + 1] = model.embedding[20]
    assert not torch.allclose(model(x, 30), model(other, 30))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("kind", KINDS, ids=["masked", "aligned", "windowed"])
@pytest.mark.parametrize("backend", ["eager", "openvino"])
def test_engines_compute_what_the_network_does(
    backend: str, kind: dict[str, Any], norm: str
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    model = tiny.denoiser(norm=norm, **kind)
    runner = make_engine(backend, EngineRequest(model, "fp32")).runner()
    for lengths in ([3], [2, 6], [9, 1, 5]):
        x = inputs(model, lengths)
        t = torch.full((len(x),), 30)
        with torch.inference_mode():
            expected, result = model(x, t), runner.predict(x, t)
        torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=["masked", "aligned", "windowed"])
def test_graphs_of_one_length_say_why_they_cannot(kind: dict[str, Any]) -> None:
    with pytest.raises(BackendUnavailableError, match="this model's sources are in slots"):
        make_engine("graph", EngineRequest(tiny.denoiser(**kind), "fp32"))


def test_what_bf16_training_computes_is_what_attention_is() -> None:
    from dlmone_fast.networks.layers import attention

    q, k, v = torch.randn(3, 2, 2, 5, 8).bfloat16().requires_grad_(True).unbind(0)
    attended = torch.tensor([[True] * 5, [True, True, False, True, False]])
    with torch.no_grad():
        expected = attention(q.float(), k.float(), v.float(), attended)
    torch.testing.assert_close(attention(q, k, v, attended).float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", KINDS, ids=["masked", "aligned", "windowed"])
def test_scores_and_logits_are_zero_behind_the_slots(kind: dict[str, Any]) -> None:
    model = tiny.denoiser(**kind)
    score = ScoreEstimator(model.lm.backbone)
    torch.nn.init.ones_(score.head.weight)
    x = inputs(model, [4, 2])
    x0, logits = score(x, model.schedule.network_time(torch.tensor([30, 20])))
    first = model.config.slots_of(x.shape[1])
    assert x0.shape == x.shape
    assert not x0[:, first:].any()
    assert not logits[:, first:].any()
    assert logits[:, :first].any()


@pytest.mark.parametrize("kind", KINDS, ids=["masked", "aligned", "windowed"])
def test_cutting_and_filling_undo_each_other(kind: dict[str, Any]) -> None:
    sizes = ModelConfig(vocab_size=65, max_positions=32, **kind)
    ids, mask, _ = sources_in_slots(encoded([3, 5]), sizes, 0)
    full, full_mask = at_full_length(ids, mask, sizes)
    assert full.shape == (2, sizes.seq_len)
    again, mask_again = trimmed(full, full_mask, sizes)
    assert torch.equal(again, ids)
    assert torch.equal(mask_again, mask)


def test_an_empty_position_is_no_token() -> None:
    model = tiny.denoiser(**MASKED)
    ids = torch.tensor([[absent_id(model.config.vocab_size), 0]])
    empty, pad = model.lm.tokens(ids)[0]
    assert not empty.any()
    assert pad.any()


@pytest.mark.parametrize("kind", KINDS, ids=["masked", "aligned", "windowed"])
def test_long_sources_are_refused_or_cut_and_counted(kind: dict[str, Any]) -> None:
    sizes = ModelConfig(vocab_size=65, max_positions=32, **kind)
    too_long = encoded([11])
    with pytest.raises(PromptError, match=r"^sources\[0\]: .*the limit is 10"):
        sources_in_slots(too_long, sizes, 0)
    with pytest.raises(PromptError, match=r"^batch\[1\]: 11 .*the limit is"):
        sources_in_slots([*encoded([2]), *too_long], sizes, 0, named="batch[{}]".format)
    ids, _, cut = sources_in_slots([*too_long, *encoded([2])], sizes, 0, on_overflow="truncate")
    assert cut == [True, False]
    assert ids.shape[1] == sizes.seq_len


def test_aligned_sizes_must_agree() -> None:
    with pytest.raises(ConfigError, match="twice source_positions"):
        ModelConfig(source="aligned", seq_len=21, source_positions=10)
    with pytest.raises(ConfigError, match="source_positions must be set"):
        ModelConfig(source="masked")
