"""The teacher's loss: DiffuSeq's terms and the anchored variant, each restated by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dlmone_fast.config import DiffusionConfig, ModelConfig, TeacherConfig
from dlmone_fast.diffusion import Schedule
from dlmone_fast.errors import UsageError
from dlmone_fast.losses.teacher import masked_mean, own_estimate, teacher_loss, token_nll
from dlmone_fast.networks import DiffusionLM

SCHEDULE = Schedule(DiffusionConfig())
IDS = torch.tensor([[1, 5, 2, 7, 0], [3, 2, 6, 2, 0], [1, 2, 4, 4, 2]])
MASK = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]])
T = torch.tensor([0, 700, 1990])
_DRAWS = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
NOISE, START_NOISE = _DRAWS
ANCHORED = TeacherConfig(
    embedding_noise=False,
    mse_target="clean",
    mse_positions="target",
    decoder_weight=0,
    prior_weight=0,
    anchor_weight=1,
)


def network(
    noise_scale: float = 1.0, normalize: bool = False, self_conditioning: bool = False
) -> DiffusionLM:
    torch.manual_seed(2)
    config = ModelConfig(
        seq_len=8,
        vocab_size=9,
        embedding_dim=8,
        time_dim=8,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        ffn_size=16,
        noise_scale=noise_scale,
        normalize_embedding=normalize,
        self_conditioning=self_conditioning,
    )
    return DiffusionLM(config).eval()


def losses(
    lm: DiffusionLM, config: TeacherConfig, ids: Tensor = IDS, noise: Tensor = NOISE
) -> dict[str, Tensor]:
    return teacher_loss(lm, SCHEDULE, config, ids, MASK, T, noise, START_NOISE)


def prediction(lm: DiffusionLM, start: Tensor) -> Tensor:
    return lm(SCHEDULE.q_sample(start, T, NOISE, MASK), T * 0.5)


def cross_entropy(lm: DiffusionLM, h: Tensor, row: int, positions: Tensor) -> float:
    logits = lm.tokens.logits(h[row][positions])
    return float(F.cross_entropy(logits, IDS[row][positions]))


@torch.no_grad()
def test_diffuseq_adds_three_terms_over_all_positions() -> None:
    lm = network()
    found = losses(lm, TeacherConfig())
    clean = lm.tokens(IDS)
    sigma = float(1 - SCHEDULE.alphas_cumprod[0]) ** 0.5
    start = clean + sigma * START_NOISE
    x0 = prediction(lm, start)
    every = torch.arange(5)
    for row in range(3):
        # At t = 0 the target is the clean embedding.
        target = clean if T[row] == 0 else start
        mse = float((target[row] - x0[row]).square().mean())
        decoder = cross_entropy(lm, start, row, every)
        prior = float((SCHEDULE.alphas_cumprod[-1] * start[row].double().square()).mean())
        assert float(found["mse"][row]) == pytest.approx(mse, abs=1e-6)
        assert float(found["nll"][row]) == pytest.approx(
            cross_entropy(lm, x0, row, MASK[row].nonzero().flatten()), abs=1e-5
        )
        assert float(found["loss"][row]) == pytest.approx(mse + decoder + prior, abs=1e-5)


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
@torch.no_grad()
def test_the_anchored_loss_weighs_the_error_in_the_unscaled_space(noise_scale: float) -> None:
    lm = network(noise_scale, normalize=True)
    found = losses(lm, ANCHORED)
    clean = lm.tokens(IDS)
    x0 = prediction(lm, clean)
    for row in range(3):
        target = MASK[row].nonzero().flatten()
        mse = float((clean[row][target] - x0[row][target]).square().mean())
        nll = cross_entropy(lm, x0, row, target)
        assert float(found["mse"][row]) == pytest.approx(mse, abs=1e-6)
        expected = noise_scale**2 * mse + nll
        assert float(found["loss"][row]) == pytest.approx(expected, abs=1e-5)


def test_weights_scale_their_terms() -> None:
    lm = network()
    nothing = replace(ANCHORED, anchor_weight=0, mse_weight=0)
    assert losses(lm, nothing)["loss"].tolist() == [0, 0, 0]
    found = losses(lm, replace(ANCHORED, mse_weight=3, anchor_weight=0.5))
    torch.testing.assert_close(found["loss"], 3 * found["mse"] + 0.5 * found["nll"])
    once = losses(lm, replace(nothing, decoder_weight=1))["loss"]
    torch.testing.assert_close(losses(lm, replace(nothing, decoder_weight=2))["loss"], 2 * once)


def test_the_logged_cross_entropy_is_not_optimised_without_an_anchor() -> None:
    lm = network()
    assert not losses(lm, TeacherConfig())["nll"].requires_grad
    assert losses(lm, ANCHORED)["nll"].requires_grad


def test_the_clean_target_ignores_the_embedding_noise() -> None:
    lm = network()
    noised = replace(ANCHORED, embedding_noise=True)
    clean_mse = losses(lm, noised)["mse"]
    x0 = prediction(lm, lm.tokens(IDS) + float(SCHEDULE.at("sigma", T)[0]) * START_NOISE)
    torch.testing.assert_close(clean_mse, masked_mean((lm.tokens(IDS) - x0).square(), MASK))
    assert not torch.allclose(losses(lm, replace(noised, mse_target="noised"))["mse"], clean_mse)


def test_target_only_terms_do_not_read_source_targets() -> None:
    """The source is an input; it is no target of the anchored loss."""
    x0 = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(4))
    lm = network()
    source = MASK == 0
    other = torch.where(source, (IDS + 1) % 9, IDS)
    nll = token_nll(lm.tokens, x0, IDS, MASK)
    assert torch.equal(token_nll(lm.tokens, x0, other, MASK), nll)
    moved = torch.where(source.unsqueeze(-1), x0 + 5, x0)
    assert torch.equal(token_nll(lm.tokens, moved, IDS, MASK), nll)


def test_source_positions_see_no_forward_noise() -> None:
    lm = network()
    other = torch.where((MASK == 0).unsqueeze(-1), NOISE + 9, NOISE)
    for name, value in losses(lm, TeacherConfig()).items():
        assert torch.equal(losses(lm, TeacherConfig(), noise=other)[name], value)


def test_masked_mean_takes_positions_or_entries() -> None:
    values = torch.arange(12.0).view(1, 3, 4)
    mask = torch.tensor([[0, 1, 1]])
    assert float(masked_mean(values, mask)) == 7.5
    assert float(masked_mean(values[..., 0], mask)) == 6


@pytest.mark.parametrize("positions", ["target", "all"])
@torch.no_grad()
def test_padding_weighs_what_it_is_given_in_the_means(positions: str) -> None:
    lm = network()
    config = replace(ANCHORED, mse_positions=positions, pad_weight=0.25)
    # 2 is [PAD] here: also within sources, where it counts in full.
    found = teacher_loss(lm, SCHEDULE, config, IDS, MASK, T, NOISE, START_NOISE, pad_id=2)
    clean = lm.tokens(IDS)
    x0 = prediction(lm, clean)
    for row in range(3):
        mse, nll, total, of_target = 0.0, 0.0, 0.0, 0.0
        for place in range(5):
            target = bool(MASK[row, place])
            weight = 0.25 if target and int(IDS[row, place]) == 2 else 1.0
            if target or positions == "all":
                mse += weight * float((clean[row, place] - x0[row, place]).square().mean())
                total += weight
            if target:
                nll += weight * cross_entropy(lm, x0, row, torch.tensor([place]))
                of_target += weight
        assert float(found["mse"][row]) == pytest.approx(mse / total, abs=1e-6)
        assert float(found["nll"][row]) == pytest.approx(nll / of_target, abs=1e-5)
    with pytest.raises(UsageError, match="pad_id is missing"):
        losses(lm, config)


def test_padding_of_weight_one_changes_no_bit() -> None:
    lm = network()
    for config in (TeacherConfig(), ANCHORED):
        plain = losses(lm, config)
        given = teacher_loss(lm, SCHEDULE, config, IDS, MASK, T, NOISE, START_NOISE, pad_id=2)
        assert all(torch.equal(plain[name], given[name]) for name in plain)


def self_conditioned() -> DiffusionLM:
    lm = network(self_conditioning=True)
    torch.nn.init.normal_(lm.backbone.estimate_projection.weight)
    return lm


def test_chosen_rows_are_given_the_networks_first_answer() -> None:
    lm, rows = self_conditioned(), torch.tensor([0, 2])
    found = teacher_loss(
        lm, SCHEDULE, ANCHORED, IDS, MASK, T, NOISE, START_NOISE, with_estimate=rows
    )
    clean = lm.tokens(IDS).detach()
    x_t = SCHEDULE.q_sample(clean, T, NOISE, MASK)
    first = lm(x_t, T * 0.5).detach()
    source = (MASK == 0).unsqueeze(-1)
    given = torch.where(source, clean, first)
    given[1] = 0
    again = lm(x_t, T * 0.5, given)
    torch.testing.assert_close(found["mse"], masked_mean((clean - again).square(), MASK))
    # A row without an estimate is the row of a network that never heard of one.
    torch.testing.assert_close(found["mse"][1], losses(lm, ANCHORED)["mse"][1])
    assert not torch.isclose(found["mse"], losses(lm, ANCHORED)["mse"])[rows].any()


def test_no_gradient_passes_through_the_estimate() -> None:
    lm = self_conditioned()
    x_t = SCHEDULE.q_sample(lm.tokens(IDS), T, NOISE, MASK)
    estimate = own_estimate(lm, x_t, T * 0.5, MASK, torch.arange(3))
    assert not estimate.requires_grad
    nothing = own_estimate(lm, x_t, T * 0.5, MASK, torch.arange(0))
    assert torch.equal(nothing, torch.zeros_like(x_t))


def test_the_first_pass_leaves_the_second_its_gradients_under_autocast() -> None:
    """Autocast caches 16-bit weights, and those of a pass without gradients have none."""
    lm = self_conditioned()
    with torch.autocast("cpu", torch.bfloat16):
        terms = teacher_loss(
            lm, SCHEDULE, ANCHORED, IDS, MASK, T, NOISE, START_NOISE, with_estimate=torch.arange(3)
        )
    terms["loss"].sum().backward()
    for name, parameter in lm.backbone.named_parameters():
        if "position" not in name:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name
