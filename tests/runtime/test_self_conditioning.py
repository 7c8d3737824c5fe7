"""A self-conditioned model: its teacher reads its last prediction, its student reads nothing."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from installed import skip_without
from torch import Tensor

from dlmone_fast.errors import BackendUnavailableError, UsageError
from dlmone_fast.kernels.nearest_token import nearest_token
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.runtime import Generator
from dlmone_fast.runtime.engines import EngineRequest, make_engine, survey
from dlmone_fast.runtime.executor import _noise_of
from dlmone_fast.samplers.loop import SamplerOptions, sample


def self_conditioned() -> Denoiser:
    denoiser = tiny.denoiser(self_conditioning=True)
    numbers = torch.Generator().manual_seed(1)
    weight = denoiser.lm.backbone.estimate_projection.weight
    weight.copy_(torch.randn(weight.shape, generator=numbers))
    return denoiser


def generator(denoiser: Denoiser, kind: str, backend: str = "eager") -> Generator:
    return Generator(denoiser, tiny.tokenizer(), tiny.settings(kind), backend=backend)


@torch.inference_mode()
def reference_ids(denoiser: Denoiser, model: Generator, prompts: list[str]) -> Tensor:
    """The sampling loop around the training network."""
    rows, _ = model._rows(
        tiny.tokenizer().encode(prompts), tiny.MAX_SOURCE_TOKENS, [0] * len(prompts), 1, "error"
    )
    source = denoiser.embedding[rows.ids]
    x0 = sample(
        denoiser, denoiser.schedule, SamplerOptions("ddim", 3), source, rows.mask,
        _noise_of(rows, source), denoiser.round_to_embedding, self_conditioning=True,
    )  # fmt: skip
    return torch.where(rows.mask != 0, nearest_token(x0, denoiser.embedding), rows.ids)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_teacher_samples_with_its_last_prediction(backend: str) -> None:
    denoiser, prompts = self_conditioned(), tiny.prompts(6)
    model = generator(denoiser, "teacher", backend)
    assert model.backend == "eager"
    found = model.generate_candidates(prompts, seeds=[0] * 6).token_ids
    expected = reference_ids(denoiser, model, prompts)
    for row, ids in enumerate(found):
        assert ids[0] == expected[row, -len(ids[0]) :].tolist()
    without = generator(tiny.denoiser(), "teacher").generate(prompts)
    assert model.generate(prompts) != without


@pytest.mark.parametrize("backend", ["eager", "openvino", "compile"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_student_answers_as_without_the_projection(
    backend: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "openvino":
        skip_without("openvino")
    # Traced only: whether it traces is the question, and compiling takes a minute.
    traced = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda f, **_: traced(f))
    prompts = tiny.prompts(5)
    plain = generator(tiny.denoiser(), "student").generate(prompts, steps=steps)
    model = generator(self_conditioned(), "student", backend)
    assert model.generate(prompts, steps=steps) == plain


@pytest.mark.parametrize("backend", ["openvino", "graph", "compile"])
def test_other_engines_refuse_such_a_teacher_with_the_reason(backend: str) -> None:
    with pytest.raises(BackendUnavailableError, match=r"reads its own last prediction.*eager"):
        generator(self_conditioned(), "teacher", backend)
    request = EngineRequest(self_conditioned(), "fp32", with_estimate=True)
    assert survey(request)["eager"] == "usable"
    assert survey(request)["auto"] == "eager"


def test_a_runner_without_estimates_takes_a_first_call_alone() -> None:
    skip_without("openvino")
    denoiser = self_conditioned()
    runner = make_engine("openvino", EngineRequest(denoiser, "fp32")).runner()
    x_t, t = torch.randn(2, tiny.SEQ_LEN, 16), torch.tensor([3, 30])
    torch.testing.assert_close(
        runner.predict_given(x_t, t, None), denoiser(x_t, t), atol=1e-4, rtol=0
    )
    with pytest.raises(BackendUnavailableError):
        runner.predict_given(x_t, t, x_t)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_eager_network_is_the_denoiser(precision: str, norm: str) -> None:
    denoiser = tiny.denoiser(self_conditioning=True, norm=norm)
    denoiser.lm.backbone.estimate_projection.weight.normal_()
    runner = make_engine("eager", EngineRequest(denoiser, precision)).runner()
    numbers = torch.Generator().manual_seed(2)
    x_t, estimate = torch.randn(2, 3, tiny.SEQ_LEN, 16, generator=numbers)
    t = torch.tensor([3, 30, 39])
    with torch.inference_mode():
        found, expected = runner.predict_given(x_t, t, estimate), denoiser(x_t, t, estimate)
    tolerance = 1e-4 if precision == "fp32" else 0.1
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_a_model_without_self_conditioning_refuses_an_estimate() -> None:
    x = torch.zeros(1, tiny.SEQ_LEN, 16)
    with pytest.raises(UsageError, match=r"without model\.self_conditioning"):
        tiny.denoiser()(x, 3, x)
    with pytest.raises(UsageError, match="x must be"):
        self_conditioned()(x, 3, x[..., :5])
