"""`load_teacher`: a model folder as the callable f(x_t, t) → x̂0, with everything around it."""

from __future__ import annotations

import dataclasses
import os
from typing import TypeVar

import torch
from torch import Tensor, nn

from dlmone_fast.config import DiffusionConfig, ModelConfig, TeacherConfig
from dlmone_fast.diffusion import Schedule
from dlmone_fast.diffusion.schedule import keep_source
from dlmone_fast.errors import ConfigError, ModelFileError, UsageError
from dlmone_fast.kernels.nearest_token import nearest_token
from dlmone_fast.losses.teacher import teacher_loss
from dlmone_fast.models.devices import pick_device
from dlmone_fast.models.folder import CONFIG_NAME, ModelFolder, check_tensors, load_folder
from dlmone_fast.networks import DiffusionLM
from dlmone_fast.samplers import steps

SectionType = TypeVar("SectionType", ModelConfig, DiffusionConfig)

# What folders of version 1 may lack: added since, and off where it is not named.
_LATER_KEYS = frozenset(
    {"source", "source_positions", "source_window", "start_from", "self_conditioning"}
)


class Denoiser(nn.Module):
    """A diffusion language model as f(x_t, t) → x̂0, with t in 0 … T - 1.

    Attributes:
        lm: embedding and backbone.
        schedule: the noise schedule, with `alphas_cumprod` and `q_sample`.
        embedding: the table E [V, d] in which diffusion and rounding happen.
    """

    def __init__(self, lm: DiffusionLM, schedule: Schedule) -> None:
        super().__init__()
        self.lm = lm
        self.schedule = schedule

    @property
    def config(self) -> ModelConfig:
        """Sizes of the networks."""
        return self.lm.config

    @property
    def embedding(self) -> Tensor:
        """The embedding table E [V, d]."""
        return self.lm.tokens.table()

    def forward(self, x_t: Tensor, t: Tensor | int, estimate: Tensor | None = None) -> Tensor:
        """x̂0 [B, L, d] of x_t [B, L, d] at timesteps t ([B], or one for all).

        `estimate` [B, L, d] is an earlier x̂0, for a model with self-conditioning; None: zeros.
        """
        time = self.schedule.network_time(self.schedule.timesteps(t, x_t))
        x_t = self._checked(x_t)
        if estimate is None:
            return self.lm(x_t, time)
        if not self.config.self_conditioning:
            raise UsageError(
                "estimate: this model was made without model.self_conditioning; leave it out"
            )
        return self.lm(x_t, time, self._checked(estimate))

    def logits(self, h: Tensor) -> Tensor:
        """Decoder logits [..., V] of h [..., d]."""
        return self.lm.tokens.logits(h.to(self.lm.tokens.weight.dtype))

    def round(self, x: Tensor) -> Tensor:
        """Ids [B, L] of the L2-nearest embedding rows of x [B, L, d]."""
        return nearest_token(self._checked(x), self.embedding)

    def round_to_embedding(self, x: Tensor) -> Tensor:
        """The L2-nearest embedding rows [B, L, d] of x [B, L, d]."""
        return self.embedding[self.round(x)]

    def loss(
        self,
        ids: Tensor,
        mask: Tensor,
        t: Tensor | int,
        *,
        embedding_noise: Tensor,
        noise: Tensor,
        config: TeacherConfig | None = None,
        pad_id: int | None = None,
    ) -> dict[str, Tensor]:
        """Per-sample `mse`, `nll` and `loss` [B] of DiffuSeq's training loss.

        Args:
            ids: [B, L].
            mask: [B, L], 0 on source positions.
            t: [B], or one for all.
            embedding_noise: standard normal draws [B, L, d] of x_0 around E(ids).
            noise: standard normal draws [B, L, d] of the forward process.
            config: another choice of terms; None: DiffuSeq's.
            pad_id: the id of [PAD]; needed for `config.pad_weight` alone.
        """
        noise, embedding_noise = self._checked(noise), self._checked(embedding_noise)
        t = self.schedule.timesteps(t, noise)
        config = config or TeacherConfig()
        return teacher_loss(
            self.lm, self.schedule, config, ids.long(), mask, t, noise, embedding_noise, pad_id
        )

    def ancestral_step(
        self,
        x_t: Tensor,
        t: Tensor | int,
        noise: Tensor,
        mask: Tensor | None = None,
        x_start: Tensor | None = None,
        clamp: bool = True,
    ) -> Tensor:
        """x_{t-1} [B, L, d] of DiffuSeq's full chain.

        Args:
            x_t: the state [B, L, d].
            t: timesteps, [B] or one for all.
            noise: standard normal draws [B, L, d]; multiplied by zero at t = 0.
            mask: [B, L], 0 on source positions, which return to `x_start`; None: no reset.
            x_start: clean source embeddings [B, L, d]; needed with `mask`.
            clamp: round x̂0 to the nearest embedding first, as the original does.
        """
        t, x_t = self.schedule.timesteps(t, x_t), self._checked(x_t)
        x = steps.ancestral(self.schedule, self._x0(x_t, t, clamp), x_t, t, noise)
        return _reset_source(x, mask, x_start)

    def published_ddim_step(
        self,
        x_t: Tensor,
        t: Tensor | int,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        x_start: Tensor | None = None,
        clamp: bool = True,
    ) -> Tensor:
        """The state after one step of DiffuSeq's strided loop, exactly as published.

        Arguments as for `ancestral_step`. The published loop runs at eta = 0: `noise` is accepted,
        so that recorded draws can be passed, and multiplied by zero.
        """
        t, x_t = self.schedule.timesteps(t, x_t), self._checked(x_t)
        x = steps.published_ddim(self.schedule, self._x0(x_t, t, clamp), x_t, t)
        return _reset_source(x, mask, x_start)

    def _x0(self, x_t: Tensor, t: Tensor, clamp: bool) -> Tensor:
        x0: Tensor = self(x_t, t)
        return self.round_to_embedding(x0) if clamp else x0

    def _checked(self, x: Tensor) -> Tensor:
        """x in the networks' dtype, if it is [B, L, d] with an L that has positions."""
        sizes = self.config
        width, most = sizes.embedding_dim, max(sizes.max_positions, sizes.seq_len)
        if x.dim() != 3 or x.shape[2] != width or not 1 <= x.shape[1] <= most:
            raise UsageError(
                f"x must be [B, L, {width}] with L from 1 to {most}, got {tuple(x.shape)}"
            )
        return x.to(self.lm.tokens.weight.dtype)


def _reset_source(x: Tensor, mask: Tensor | None, x_start: Tensor | None) -> Tensor:
    if mask is None:
        return x
    if x_start is None:
        raise UsageError("x_start is missing: mask resets source positions to it; pass both")
    return keep_source(x, x_start, mask)


def load_teacher(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Denoiser:
    """The denoiser of a model folder, in evaluation mode, float32, with frozen parameters.

    Args:
        path: a model folder (of a teacher or a student).
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UsageError: the device does not exist here.
        ModelFileError: the folder is missing, damaged, or its tensors do not fit its config.
    """
    return denoiser_from_folder(load_folder(path)).to(pick_device(device))


def denoiser_from_folder(folder: ModelFolder) -> Denoiser:
    """Build the networks that a verified model folder describes, and load its tensors."""
    model, diffusion = _configs(folder)
    with torch.device("meta"):
        described = DiffusionLM(model).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in described.items()}
    check_tensors(expected, folder.tensors, folder.path)
    tensors = {name: tensor.float() for name, tensor in folder.tensors.items()}
    lm = DiffusionLM.from_tensors(model, tensors)
    return Denoiser(lm, Schedule(diffusion)).eval().requires_grad_(False)


def _configs(folder: ModelFolder) -> tuple[ModelConfig, DiffusionConfig]:
    model = _section(ModelConfig, folder, "model")
    # To a run 0 means: from its tokenizer. No weights have it.
    if model.vocab_size < 1:
        raise ModelFileError(
            f"{folder.path / CONFIG_NAME}: model: vocab_size must be at least 1, got "
            f"{model.vocab_size}; copy the folder again from its source"
        )
    return model, _section(DiffusionConfig, folder, "diffusion")


def _section(kind: type[SectionType], folder: ModelFolder, name: str) -> SectionType:
    where, values = folder.path / CONFIG_NAME, folder.config[name]
    # A default in the place of what the weights were trained with would load, and be wrong.
    required = {item.name for item in dataclasses.fields(kind)} - _LATER_KEYS
    missing = sorted(required - set(values))
    if missing:
        raise ModelFileError(
            f"{where}: {name} lacks {', '.join(missing[:3])}; copy the folder again from its source"
        )
    try:
        return kind(**values)
    except (ConfigError, TypeError) as error:
        raise ModelFileError(
            f"{where}: {name}: {error!s:.200}; the folder may come from a newer version of "
            "dlmone_fast"
        ) from error
