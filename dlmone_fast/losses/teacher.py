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
from dlmone_fast.diffusion.schedule import keep_source
from dlmone_fast.errors import UsageError
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
    pad_id: int | None = None,
    with_estimate: Tensor | None = None,
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
        pad_id: the id of [PAD]; read only if `config.pad_weight` is not 1.
        with_estimate: the rows [n], on the CPU, that are given the network's own estimate of x_0
            (self-conditioning), while the others are given zeros; None: no row.

    Returns:
        `mse`, `nll` and `loss`, each [B].

    Raises:
        UsageError: `config.pad_weight` is not 1 and there is no `pad_id`.
    """
    x_mean = model.tokens(ids)
    x_start = x_mean
    if config.embedding_noise:
        x_start = schedule.embedding_noise(x_mean, embedding_noise)
    x_t = schedule.q_sample(x_start, t, noise, mask)
    time = schedule.network_time(t)
    if with_estimate is None:
        x0 = model(x_t, time)
    else:
        x0 = model(x_t, time, own_estimate(model, x_t, time, mask, with_estimate))
    weights = _position_weights(config.pad_weight, ids, mask, pad_id)
    mse = _mse(config, x0, x_start, x_mean, mask, t, weights)
    nll = _nll(model.tokens, x0, ids, mask, weights, optimised=config.anchor_weight > 0)
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


@torch.no_grad()
def own_estimate(
    model: DiffusionLM, x_t: Tensor, time: Tensor, mask: Tensor, rows: Tensor
) -> Tensor:
    """What a self-conditioned network is given in training [B, L, d] (Analog Bits, 2208.04202).

    In the rows [n] it is the network's own x̂0 without an estimate, with the clean source in its
    source positions, as in sampling; elsewhere zeros. No gradient passes through it.
    """
    estimate = torch.zeros_like(x_t)
    if len(rows):
        rows = rows.to(x_t.device)
        chosen = x_t[rows]
        x0 = model(chosen, time[rows])
        estimate[rows] = keep_source(x0, chosen, mask[rows])
        # Autocast keeps the 16-bit weights of a pass; without gradients, these have none either.
        torch.clear_autocast_cache()
    return estimate


def _position_weights(
    pad_weight: float, ids: Tensor, mask: Tensor, pad_id: int | None
) -> Tensor | None:
    """The weight [B, L] of each position: `pad_weight` for a [PAD] target; None: 1 for all."""
    if pad_weight == 1:
        return None
    if pad_id is None:
        raise UsageError(f"pad_id is missing: pad_weight is {pad_weight}; pass the id of [PAD]")
    padding = (ids == pad_id) & (mask != 0)
    return torch.where(padding, pad_weight, 1.0)


def token_nll(
    tokens: TokenEmbedding,
    h: Tensor,
    ids: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy [B] of decoding h [B, L, d] to ids [B, L] where mask [B, L] is not 0,
    weighted by `weights` [B, L]."""
    losses = token_losses(tokens, h, ids, mask)
    if weights is not None:
        return masked_mean(losses, mask, weights)
    return losses.sum(1) / (mask != 0).sum(1).clamp(min=1)


def token_losses(tokens: TokenEmbedding, h: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The cross-entropies [B, L] of `token_nll`, 0 where mask is 0."""
    table = tokens.table()
    if tokens.in_slots:
        # What an empty position holds is no row of the table; its mask is 0.
        ids = ids.clamp(max=len(table) - 1)
    if torch.is_autocast_enabled(h.device.type):
        # A custom operation computes in the dtypes it is given.
        dtype = torch.get_autocast_dtype(h.device.type)
        h, table = h.to(dtype), table.to(dtype)
    return linear_cross_entropy(h, table, ids, tokens.bias, mask=mask)


def _nll(
    tokens: TokenEmbedding,
    x0: Tensor,
    ids: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    optimised: bool,
) -> Tensor:
    with torch.set_grad_enabled(optimised and torch.is_grad_enabled()):
        return token_nll(tokens, x0, ids, mask, weights)


def _mse(
    config: TeacherConfig,
    x0: Tensor,
    x_start: Tensor,
    x_mean: Tensor,
    mask: Tensor,
    t: Tensor,
    weights: Tensor | None,
) -> Tensor:
    positions = torch.ones_like(mask) if config.mse_positions == "all" else mask
    if config.mse_target == "clean":
        return masked_mean((x_mean - x0).square(), positions, weights)
    # DiffuSeq regresses to the clean embedding at t = 0 and to the noised one elsewhere.
    target = torch.where((t == 0).view(-1, 1, 1), x_mean, x_start)
    return masked_mean((target - x0).square(), positions, weights)


def masked_mean(values: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Per-sample mean [B] of values [B, L, d] or [B, L] over the positions where mask is not 0,
    weighted by `weights` [B, L]."""
    per_position = values.mean(-1) if values.dim() == 3 else values
    kept = (mask != 0).to(per_position.dtype)
    if weights is not None:
        kept = kept * weights
    return (per_position * kept).sum(1) / kept.sum(1)
