"""The generator θ: one call at t_init, or a few by re-noising its own output.

DLM-One (arXiv 2506.00290) §3; the re-noising times follow SiD-LSG: call i of n runs at
t_i = int(t_init (1 - i / n)), and nothing is rounded between calls. Training for several calls
matches the even mixture of what 1 … n calls give (few-step SiD, arXiv 2505.12674).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, full

from dlmone_fast.checks import is_whole
from dlmone_fast.diffusion import Schedule
from dlmone_fast.diffusion.schedule import keep_source
from dlmone_fast.errors import UsageError
from dlmone_fast.samplers.loop import Noise, Predict
from dlmone_fast.samplers.steps import renoise


def renoising_times(t_init: int, steps: int) -> list[int]:
    """The timesteps of `steps` generator calls.

    Raises:
        UsageError: more calls than t_init has timesteps.
    """
    if not is_whole(steps, 1, t_init):
        raise UsageError(f"steps must be between 1 and t_init ({t_init}), got {steps!r}")
    return [int(t_init * (1 - i / steps)) for i in range(steps)]


def generate_embeddings(
    predict: Predict,
    schedule: Schedule,
    t_init: int,
    steps: int,
    source: Tensor,
    mask: Tensor,
    noise: Noise,
    scale_latent: bool = True,
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """x_0 [B, L, d] of G_θ(z, source): target positions generated, source positions clean.

    Args:
        predict: f(x_t [B, L, d], t [B]) → x̂0 [B, L, d].
        schedule: the noise schedule.
        t_init: timestep of the first call.
        steps: generator calls.
        source: embeddings [B, L, d]; only source positions are read.
        mask: [B, L], 0 on source positions.
        noise: standard normal draws [B, L, d]; `noise(i)` serves call i, from 0.
        scale_latent: feed sigma(t_init) z rather than z.
        callback: called as (i, t, x̂0) after each call.
    """
    x0 = source
    for i, t in enumerate(renoising_times(t_init, steps)):
        if i == 0:
            x = _scaled_latent(schedule, t, noise, scale_latent)
        else:
            x = renoise(schedule, x0, t, noise(i))
        x = keep_source(x, source, mask)
        x0 = keep_source(predict(x, full((len(x),), t, device=x.device)), source, mask)
        if callback is not None:
            callback(i, t, x0)
    return x0


def generate_mixture(
    predict: Predict,
    draft: Predict,
    schedule: Schedule,
    t_init: int,
    steps: int,
    calls: Tensor,
    source: Tensor,
    mask: Tensor,
    noise: Noise,
    scale_latent: bool = True,
) -> Tensor:
    """`generate_embeddings`, cut off after each row's own number of calls.

    Args:
        predict: makes the last call of every row, all in one batch; gradients reach it alone.
        draft: makes the calls before.
        steps: calls n whose timesteps are used.
        calls: int64 [B] on the CPU, from 1 to n.

    The other arguments are those of `generate_embeddings`.
    """
    times = renoising_times(t_init, steps)
    device = source.device
    with torch.no_grad():
        x = keep_source(_scaled_latent(schedule, t_init, noise, scale_latent), source, mask)
        for i in range(1, int(calls.max())):
            rows = (calls > i).nonzero().squeeze(1).to(device)
            given, target = source[rows], mask[rows]
            x0 = draft(x[rows], full((len(rows),), times[i - 1], device=device))
            x0 = keep_source(x0, given, target)
            x[rows] = keep_source(renoise(schedule, x0, times[i], noise(i)[rows]), given, target)
    t = torch.tensor(times)[calls - 1].to(device)
    return keep_source(predict(x, t), source, mask)


def _scaled_latent(schedule: Schedule, t_init: int, noise: Noise, scale_latent: bool) -> Tensor:
    sigma = float(1 - schedule.alphas_cumprod[t_init]) ** 0.5 if scale_latent else 1.0
    return sigma * noise(0)
