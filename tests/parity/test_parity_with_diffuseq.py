"""Parity with the original DiffuSeq: recorded outputs of its code on a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dlmone_fast.config import ModelConfig
from dlmone_fast.diffusion.schedule import keep_source
from dlmone_fast.models.denoiser import Denoiser, load_teacher
from dlmone_fast.models.diffuseq import import_teacher
from dlmone_fast.networks import DiffusionLM
from dlmone_fast.networks.layers import count_parameters
from dlmone_fast.samplers.loop import SamplerOptions, sample

TINY = Path(__file__).parents[1] / "data" / "diffuseq-tiny"
RECORDED_T = (0, 10, 745, 1490, 1976, 1999)
CHAINS = ("p_first", "p_last", "ddim_gap31")

pytestmark = pytest.mark.filterwarnings("ignore:.*embedding matrices differ")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(TINY / "golden.safetensors")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Denoiser]:
    """The tiny checkpoint with its raw and with its EMA embedding."""
    root = tmp_path_factory.mktemp("imported")
    for kind in ("raw", "ema"):
        import_teacher(TINY, root / kind, embedding=kind)
    return {kind: load_teacher(root / kind) for kind in ("raw", "ema")}


@pytest.fixture(scope="module")
def teacher(imported: dict[str, Denoiser]) -> Denoiser:
    return imported["raw"]


def largest_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max())


@pytest.mark.parametrize("t", RECORDED_T)
def test_the_network_gives_the_original_output(
    teacher: Denoiser, golden: dict[str, Tensor], t: int
) -> None:
    x, expected = golden["forward_x"], golden[f"forward_out_t{t}"]
    assert largest_error(teacher(x, torch.full((len(x),), t)), expected) <= 1e-5
    assert largest_error(teacher(x, t), expected) <= 1e-5


def test_rows_of_a_batch_may_have_different_timesteps(
    teacher: Denoiser, golden: dict[str, Tensor]
) -> None:
    t = torch.tensor(RECORDED_T[:4])
    expected = torch.stack([golden[f"forward_out_t{t}"][row] for row, t in enumerate(t.tolist())])
    assert largest_error(teacher(golden["forward_x"], t), expected) <= 1e-5


def test_logits(teacher: Denoiser, golden: dict[str, Tensor]) -> None:
    assert largest_error(teacher.logits(golden["logits_in"]), golden["logits_out"]) <= 1e-5


@pytest.mark.parametrize(
    "table",
    [
        "betas",
        "alphas_cumprod",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_variance",
    ],
)
def test_the_schedule_is_the_original_one(
    teacher: Denoiser, golden: dict[str, Tensor], table: str
) -> None:
    found, expected = getattr(teacher.schedule, table), golden[f"schedule_{table}"]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_forward_diffusion_keeps_the_source(teacher: Denoiser, golden: dict[str, Tensor]) -> None:
    x0, mask = teacher.embedding[golden["input_ids"]], golden["input_mask"]
    x_t = teacher.schedule.q_sample(x0, golden["q_t"], golden["q_noise"], mask)
    assert largest_error(x_t, golden["q_out"]) <= 1e-5
    assert torch.equal(x_t[mask == 0], x0[mask == 0])


def test_rounding(teacher: Denoiser, golden: dict[str, Tensor]) -> None:
    rows = teacher.round_to_embedding(golden["round_in"])
    assert torch.equal(rows, golden["round_out"])
    assert torch.equal(teacher.embedding[teacher.round(golden["round_in"])], rows)


@pytest.mark.parametrize("term", ["mse", "nll", "loss"])
def test_loss_terms(teacher: Denoiser, golden: dict[str, Tensor], term: str) -> None:
    found = teacher.loss(
        golden["input_ids"],
        golden["input_mask"],
        golden["q_t"],
        embedding_noise=golden["loss_embedding_noise"],
        noise=golden["loss_noise"],
    )
    # t = 0 is among the rows: there the target is the clean embedding.
    assert 0 in golden["q_t"]
    assert largest_error(found[term], golden[f"loss_{term}"]) <= 1e-5


@pytest.mark.parametrize("chain", CHAINS)
def test_sampler_steps_follow_the_recorded_chain(
    teacher: Denoiser, golden: dict[str, Tensor], chain: str
) -> None:
    step = teacher.published_ddim_step if "ddim" in chain else teacher.ancestral_step
    mask, source = golden["input_mask"], teacher.embedding[golden["input_ids"]]
    x = golden[f"{chain}_start"]
    for t, noise, expected in zip(
        golden[f"{chain}_steps"].tolist(),
        golden[f"{chain}_noises"],
        golden[f"{chain}_out"],
        strict=True,
    ):
        x = step(x, t, noise, mask, source)
        assert largest_error(x, expected) <= 1e-4


class _EnoughError(Exception):
    """Ends a chain after its recorded part."""


@pytest.mark.parametrize(
    ("chain", "method", "steps"),
    [("p_first", "ancestral", 2000), ("ddim_gap31", "published-ddim", 65)],
)
def test_the_sampling_loop_starts_as_the_recorded_chain(
    teacher: Denoiser, golden: dict[str, Tensor], chain: str, method: str, steps: int
) -> None:
    mask, source = golden["input_mask"], teacher.embedding[golden["input_ids"]]
    recorded = golden[f"{chain}_out"]
    times: list[int] = []

    def noise(k: int) -> Tensor:
        return golden["sample_noise"] if k == 0 else golden[f"{chain}_noises"][k - 1]

    def compare(k: int, t: int, x: Tensor) -> None:
        times.append(t)
        assert largest_error(x, recorded[k - 1]) <= 1e-4
        if k == len(recorded):
            raise _EnoughError

    start = keep_source(golden["sample_noise"], source, mask)
    assert largest_error(start, golden[f"{chain}_start"]) == 0
    options = SamplerOptions(method, steps)
    with pytest.raises(_EnoughError):
        sample(
            teacher,
            teacher.schedule,
            options,
            source,
            mask,
            noise,
            teacher.round_to_embedding,
            compare,
        )
    assert times == golden[f"{chain}_steps"].tolist()


def ema_against_raw(imported: dict[str, Denoiser]) -> Iterator[tuple[str, Tensor, Tensor]]:
    raw, ema = (dict(imported[kind].lm.named_parameters()) for kind in ("raw", "ema"))
    return ((name, raw[name], ema[name]) for name in raw)


def test_only_the_raw_embedding_reproduces_official_sampling(
    imported: dict[str, Denoiser], golden: dict[str, Tensor]
) -> None:
    different = [n for n, raw, ema in ema_against_raw(imported) if not torch.equal(raw, ema)]
    assert different == ["tokens.weight"]
    assert largest_error(imported["ema"].logits(golden["logits_in"]), golden["logits_out"]) > 1e-3
    ema_start = imported["ema"].embedding[golden["input_ids"]]
    assert not torch.equal(ema_start, imported["raw"].embedding[golden["input_ids"]])


def test_the_original_size_has_the_published_parameter_count() -> None:
    with torch.device("meta"):
        lm = DiffusionLM(ModelConfig(vocab_size=30_522))
    assert count_parameters(lm) == 91_225_274
    blocks = lm.backbone.blocks
    assert count_parameters(blocks) == 85_054_464
    assert count_parameters(lm.tokens) == 3_906_816 + 30_522
    assert count_parameters(lm.backbone.time_mlp) == 460_032
    assert count_parameters(lm.backbone.input_projection) == 689_664
    assert count_parameters(lm.backbone.output_projection) == 689_024
