"""From a model folder to a `Generator`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dlmone_fast.config.room import default_source_limit
from dlmone_fast.data.layouts import source_limit
from dlmone_fast.errors import ModelFileError, UsageError
from dlmone_fast.models.denoiser import denoiser_from_folder
from dlmone_fast.models.devices import pick_device
from dlmone_fast.models.folder import ModelFolder, load_folder
from dlmone_fast.runtime.generator import Generator
from dlmone_fast.runtime.options import GenerationSettings
from dlmone_fast.runtime.pool import MAX_QUEUED
from dlmone_fast.samplers.grids import timestep_grid
from dlmone_fast.tokenizer import Tokenizer

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
        path: the folder.
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
    folder = load_folder(path)
    denoiser = denoiser_from_folder(folder).to(target)
    tokenizer = _tokenizer(folder, denoiser.config.vocab_size)
    settings = _settings(folder)
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


def _tokenizer(folder: ModelFolder, vocab_size: int) -> Tokenizer | None:
    if folder.tokenizer_path is None:
        return None
    tokenizer = Tokenizer.from_file(folder.tokenizer_path)
    if tokenizer.vocab_size != vocab_size:
        raise ModelFileError(
            f"{folder.tokenizer_path}: has {tokenizer.vocab_size} tokens, the model's embedding "
            f"has {vocab_size}; use the tokenizer that the model was trained with"
        )
    return tokenizer


def _settings(folder: ModelFolder) -> GenerationSettings:
    known = {item.name for item in dataclasses.fields(GenerationSettings)}
    values: dict[str, Any] = {k: v for k, v in folder.generation_config.items() if k in known}
    values["kind"] = folder.config["kind"]
    if values["kind"] == "teacher":
        values = {"sampler": "ddim", "steps": 20, **values}
    model = folder.config["model"]
    positions = int(model["seq_len"]), int(model.get("source_positions", 0))
    values.setdefault("max_source_tokens", default_source_limit(*positions))
    try:
        settings = GenerationSettings(**values)
        source_limit(positions[0], settings.max_source_tokens, positions[1])
        last = int(folder.config["diffusion"]["num_timesteps"]) - 1
        if settings.kind == "student" and settings.t_init > last:
            raise UsageError(f"t_init must be at most {last}, got {settings.t_init}")
        if settings.kind == "teacher":
            timestep_grid(settings.sampler, settings.steps, last + 1)
        return settings
    except (UsageError, TypeError) as error:
        where = Path(folder.path) / "generation_config.json"
        raise ModelFileError(f"{where}: {error}") from error
