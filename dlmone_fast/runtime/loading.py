"""From a model folder to a `Generator`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch

from dlmone_fast.aligned_tokenizer import read_tokenizer
from dlmone_fast.config.room import default_source_limit
from dlmone_fast.data.layouts import source_limit
from dlmone_fast.errors import ModelFileError, UsageError
from dlmone_fast.models.commit import complete_path
from dlmone_fast.models.denoiser import Denoiser, denoiser_from_folder
from dlmone_fast.models.devices import pick_device
from dlmone_fast.models.folder import GENERATION_NAME, ModelFolder, load_folder
from dlmone_fast.packaged import folder_of
from dlmone_fast.runtime import hub
from dlmone_fast.runtime.generator import Generator
from dlmone_fast.runtime.options import GenerationSettings, refuse_calibration
from dlmone_fast.runtime.pool import MAX_QUEUED
from dlmone_fast.samplers.grids import timestep_grid
from dlmone_fast.text_tokenizer import TextTokenizer

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")


def load_model(
    path: str | os.PathLike[str],
    device: str = "auto",
    dtype: str = "auto",
    *,
    backend: str = "auto",
    calibration: Sequence[str] | None = None,
    max_queued: int = MAX_QUEUED,
) -> Generator:
    """Load a model folder, verified against its manifest.

    Args:
        path: the folder, or the name of a packaged model.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        dtype: auto (fp32 on a CPU, bf16 on a GPU), fp32, bf16, fp16 or int8.
        backend: what runs the network: auto, eager, compile, graph (CUDA) or openvino (CPU).
        calibration: real prompts, some hundred, that int8 measures its scales on.
        max_queued: calls that may wait for the model before `QueueFullError`.

    Raises:
        ModelFileError: the folder is missing, damaged or does not fit.
        UsageError: the device or dtype does not exist here.
        BackendUnavailableError: the backend asked for cannot run this model here.
    """
    target = pick_device(device)
    precision = pick_precision(dtype, target)
    if calibration is not None:
        refuse_calibration(precision)
    path = folder_of(path)
    if hub.is_repository(path) and not os.path.lexists(complete_path(path)):
        raise ModelFileError(
            f"{os.fspath(path)}: no such folder; check the path, or, if it is the id of a model on "
            f"the hub, use dlmone_fast.from_pretrained({os.fspath(path)!r}, download=True)"
        )
    folder = load_folder(path)
    denoiser = denoiser_from_folder(folder).to(target)
    tokenizer = _tokenizer(folder, denoiser.config.vocab_size)
    settings = _settings(folder, denoiser)
    if tokenizer is not None:
        tokenizer.max_chars = settings.max_chars
    # The tensors live on in the networks; the folder keeps what describes them.
    described = dataclasses.replace(folder, tensors={})
    return Generator(
        denoiser,
        tokenizer,
        settings,
        precision,
        described,
        backend=backend,
        calibration=calibration,
        max_queued=max_queued,
    )


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of a name on a device; auto: fp32 on a CPU, bf16 on a GPU."""
    if name not in PRECISIONS:
        raise UsageError(f"dtype must be one of {', '.join(PRECISIONS)}; got {name!r}")
    if name == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return name


def _tokenizer(folder: ModelFolder, vocab_size: int) -> TextTokenizer | None:
    if folder.tokenizer_path is None:
        return None
    record = folder.files[folder.tokenizer_path.name]
    tokenizer = read_tokenizer(folder.tokenizer_path, record.sha256)
    if tokenizer.vocab_size != vocab_size:
        raise ModelFileError(
            f"{folder.tokenizer_path}: has {tokenizer.vocab_size} tokens, the model's embedding "
            f"has {vocab_size}; use the tokenizer that the model was trained with"
        )
    return tokenizer


def _settings(folder: ModelFolder, denoiser: Denoiser) -> GenerationSettings:
    where = folder.path / GENERATION_NAME
    known = {item.name for item in dataclasses.fields(GenerationSettings)}
    values: dict[str, Any] = {k: v for k, v in folder.generation_config.items() if k in known}
    values["kind"] = folder.config["kind"]
    if values["kind"] == "teacher":
        values = {"sampler": "ddim", "steps": 20, **values}
    else:
        # A student works as it was trained alone: a default would be another model.
        missing = [name for name in ("t_init", "scale_latent") if name not in values]
        if missing:
            raise ModelFileError(
                f"{where}: a student's must hold {' and '.join(missing)}; copy the folder again "
                "from its source"
            )
    model, num_timesteps = denoiser.config, denoiser.schedule.num_timesteps
    room = model.source_positions, model.source
    values.setdefault("max_source_tokens", default_source_limit(model.seq_len, *room))
    try:
        settings = GenerationSettings(**values)
        source_limit(model.seq_len, settings.max_source_tokens, *room)
        if settings.kind == "student" and settings.t_init >= num_timesteps:
            raise UsageError(f"t_init must be at most {num_timesteps - 1}, got {settings.t_init}")
        if settings.kind == "teacher":
            timestep_grid(settings.sampler, settings.steps, num_timesteps)
        return settings
    except (UsageError, TypeError) as error:
        raise ModelFileError(f"{where}: {error}; copy the folder again from its source") from error
