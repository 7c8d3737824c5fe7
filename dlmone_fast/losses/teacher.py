"""The teacher's loss: DiffuSeq's, and the anchored variant, from one set of terms.

DiffuSeq (`training_losses_seq2seq`): loss = mse + decoder + prior, where x_0 = E(ids) + sigma_0
noise on every position. Its `nll`, the cross-entropy of the decoder on x̂0, is logged only; with
`anchor_weight` it is optimised (the anchor loss of Difformer, arXiv 2212.09412).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlmone_fast.config import TeacherConfig
from dlmone_fast.diffusion import Draw, Schedule
from dlmone_fast.kernels.linear_cross_entropy import linear_cross_entropy
from dlmone_fast.networks import DiffusionLM, TokenEmbedding


def teacher_loss(
    model: DiffusionLM,
    schedule: Schedule,
    config: TeacherConfig,
    ids: Tensor,
    mask: Tensor,
    t: Tensor,
    noise: Tensor | Draw,
    embedding_noise: Tensor | Draw,
) -> dict[str, Tensor]:
    """Per-sample terms of the teacher's loss.

    Args:
        model: the teacher φ.
        schedule: the noise schedule.
        config: weights, targets and positions of the terms.
        ids: [B, L].
        mask: [B, L], 0 on source positions.
        t: [B].
        noise: standard normal draws [B, L, d] of the forward process, or their counters.
        embedding_noise: the same for the embedding step; read only if `config.embedding_noise`.

    Returns:
        `mse`, `nll` and `loss`, each [B].
    """
    x_mean = model.tokens(ids)
    x_start = x_mean
    if config.embedding_noise:
        x_start = schedule.embedding_noise(x_mean, embedding_noise)
    x_t = schedule.q_sample(x_start, t, noise, mask)
    x0 = model(x_t, schedule.network_time(t))
    mse = _mse(config, x0, x_start, x_mean, mask, t)
    nll = _nll(model.tokens, x0, ids, mask, optimised=config.anchor_weight > 0)
    # In the space before the division by F, so that F does not change the weight of the term.
    loss = config.mse_weight * model.config.noise_scale**2 * mse
    if config.anchor_weight:
        loss = loss + config.anchor_weight * nll
    if config.decoder_weight:
        every = torch.ones_like(mask)
        loss = loss + config.decoder_weight * token_nll(model.tokens, x_start, ids, every)
    if config.prior_weight:
        last = torch.full_like(t, schedule.num_timesteps - 1)
        prior = (schedule.at("alpha", last) * x_start).square().flatten(1).mean(1)
        loss = loss + config.prior_weight * prior
    return {"mse": mse, "nll": nll, "loss": loss}


def token_nll(tokens: TokenEmbedding, h: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy [B] of decoding h [B, L, d] to ids [B, L] where mask [B, L] is not 0."""
    return token_losses(tokens, h, ids, mask).sum(1) / (mask != 0).sum(1).clamp(min=1)


def token_losses(tokens: TokenEmbedding, h: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The cross-entropies [B, L] of `token_nll`, 0 where mask is 0."""
    table = tokens.table()
    if torch.is_autocast_enabled(h.device.type):
        # A custom operation computes in the dtypes it is given.
        dtype = torch.get_autocast_dtype(h.device.type)
        h, table = h.to(dtype), table.to(dtype)
    return linear_cross_entropy(h, table, ids, tokens.bias, mask=mask)


def _nll(tokens: TokenEmbedding, x0: Tensor, ids: Tensor, mask: Tensor, optimised: bool) -> Tensor:
    with torch.set_grad_enabled(optimised and torch.is_grad_enabled()):
        return token_nll(tokens, x0, ids, mask)


def _mse(
    config: TeacherConfig, x0: Tensor, x_start: Tensor, x_mean: Tensor, mask: Tensor, t: Tensor
) -> Tensor:
    positions = torch.ones_like(mask) if config.mse_positions == "all" else mask
    if config.mse_target == "clean":
        return masked_mean((x_mean - x0).square(), positions)
    # DiffuSeq regresses to the clean embedding at t = 0 and to the noised one elsewhere.
    target = torch.where((t == 0).view(-1, 1, 1), x_mean, x_start)
    return masked_mean((target - x0).square(), positions)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Per-sample mean [B] of values [B, L, d] or [B, L] over the positions where mask is not 0."""
    per_position = values.mean(-1) if values.dim() == 3 else values
    weights = (mask != 0).to(per_position.dtype)
    return (per_position * weights).sum(1) / weights.sum(1)
