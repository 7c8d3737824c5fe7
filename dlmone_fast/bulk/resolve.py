"""What a job's options come to: checked against its model, and nothing left to "auto"."""

from __future__ import annotations

from dataclasses import replace

import torch

from dlmone_fast.bulk.job import Options
from dlmone_fast.errors import BackendUnavailableError, UsageError
from dlmone_fast.runtime import Generator, load_model
from dlmone_fast.runtime.engines import BACKENDS, EngineRequest, survey, why_unavailable
from dlmone_fast.runtime.loading import pick_precision
from dlmone_fast.runtime.options import MAX_CANDIDATES, whole_number
from dlmone_fast.samplers.grids import timestep_grid
from dlmone_fast.samplers.one_step import renoising_times


def resolved(options: Options, device: str, dtype: str, backend: str, *, here: bool) -> Options:
    """The options with the device, precision and backend that every worker is to have.

    They are chosen once and not by each worker: workers that differ would write texts that differ.

    Args:
        options: the rest, checked here.
        device: cpu or cuda.
        dtype: a name of `load_model`, auto included.
        backend: likewise.
        here: the workers run on this machine; what those of a cluster have, they say themselves.

    Raises:
        ModelFileError: the model's folder is missing, damaged or without a tokenizer.
        UsageError: an option is out of its bounds, or not one of this model's.
        BackendUnavailableError: the backend cannot run this model here.
    """
    if dtype == "int8":
        raise UsageError(
            "dtype: int8 is calibrated on prompts, which a bulk job has none for; use auto, fp32, "
            "bf16 or fp16"
        )
    if backend not in BACKENDS:
        raise UsageError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    precision = pick_precision(dtype, torch.device(device))
    model = load_model(options.model, "cpu", "fp32", backend="eager")
    _check(options, model)
    return replace(
        options, device=device, dtype=precision,
        backend=_backend(backend, device, precision, model, here),
    )  # fmt: skip


def _check(options: Options, model: Generator) -> None:
    """Raise for what the first shard would end with."""
    whole_number("num_candidates", options.num_candidates, 1, MAX_CANDIDATES)
    settings = model.settings.with_call(options.steps, options.sampler, None, options.temperature)
    if settings.kind == "teacher":
        num_timesteps = model.denoiser.schedule.num_timesteps
        timestep_grid(settings.sampler, settings.steps, num_timesteps)
    else:
        renoising_times(settings.t_init, settings.steps)
    # Without one it raises.
    _ = model.tokenizer


def _backend(asked: str, device: str, precision: str, model: Generator, here: bool) -> str:
    with_estimate = model.settings.kind == "teacher" and model.denoiser.config.self_conditioning
    request = EngineRequest(model.denoiser, precision, with_estimate=with_estimate)
    if device != "cpu":
        # What "auto" takes on a GPU, where OpenVINO does not run.
        return "eager" if asked == "auto" else asked
    found = survey(request)["auto"] if asked == "auto" else asked
    reason = why_unavailable(found, request) if here else None
    if reason:
        raise BackendUnavailableError(
            f"--backend {found}: cannot run this model on this machine ({reason}); use "
            "--backend auto"
        )
    return found
