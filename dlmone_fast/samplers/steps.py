"""One step of each sampler, from x_t and the prediction x̂0 to the next, less noisy x.

alpha_t = sqrt(alpha_bar_t), sigma_t = sqrt(1 - alpha_bar_t). Steps are pure: noise is an argument.
A jump to `None` is the jump to data, where alpha is 1 and sigma 0.
"""

from __future__ import annotations

import math

from torch import Tensor

from dlmone_fast.diffusion import Schedule


def ancestral(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_{t-1} ~ p(x_{t-1} | x_t) with DiffuSeq's "fixed large" variance beta_t; none at t = 0."""
    mean = schedule.at("coef1", t) * x0 + schedule.at("coef2", t) * x_t
    spread = schedule.at("beta", t).sqrt() * (t > 0).view(-1, 1, 1)
    return mean + spread * noise


def published_ddim(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """DiffuSeq's DDIM update exactly as published: always to the noise level of t - 1.

    With a gap above 1 its loop then calls the network at t - gap, a level the state has not
    reached; that mismatch is the original's and part of its published few-step results.
    """
    alpha_prev = schedule.at("alpha_prev", t)
    return alpha_prev * x0 + schedule.at("sigma_prev", t) * _noise_of(schedule, x0, x_t, t)


def ddim(
    schedule: Schedule,
    x0: Tensor,
    x_t: Tensor,
    t: int,
    t_next: int | None,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """DDIM (arXiv 2010.02502, Eq. 12) from t to t_next; eta 0 is the ODE, 1 ancestral-like."""
    if t_next is None:
        return x0
    alpha_bar, alpha_bar_next = _alpha_bar(schedule, t), _alpha_bar(schedule, t_next)
    direction = (x_t - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)
    spread = eta * math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar))
    spread *= math.sqrt(1 - alpha_bar / alpha_bar_next)
    x = math.sqrt(alpha_bar_next) * x0
    x = x + math.sqrt(max(0.0, 1 - alpha_bar_next - spread**2)) * direction
    return x if noise is None or spread == 0 else x + spread * noise


def renoise(schedule: Schedule, x0: Tensor, t_next: int | None, noise: Tensor) -> Tensor:
    """q-sampling: forget x_t and draw x at t_next afresh from q(x | x̂0)."""
    if t_next is None:
        return x0
    alpha_bar = _alpha_bar(schedule, t_next)
    return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * noise


def dpm_solver(
    schedule: Schedule,
    x0: Tensor,
    x_t: Tensor,
    t: int,
    t_next: int | None,
    x0_before: Tensor | None = None,
    t_before: int | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2); first order without an earlier x̂0."""
    if t_next is None:
        return x0
    log_snr, log_snr_next = _half_log_snr(schedule, t), _half_log_snr(schedule, t_next)
    h = log_snr_next - log_snr
    estimate = x0
    if x0_before is not None and t_before is not None:
        r = (log_snr - _half_log_snr(schedule, t_before)) / h
        estimate = (1 + 0.5 / r) * x0 - 0.5 / r * x0_before
    alpha_bar, alpha_bar_next = _alpha_bar(schedule, t), _alpha_bar(schedule, t_next)
    shrink = math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar))
    return shrink * x_t - math.sqrt(alpha_bar_next) * math.expm1(-h) * estimate


def _alpha_bar(schedule: Schedule, t: int) -> float:
    return float(schedule.alphas_cumprod[t])


def _half_log_snr(schedule: Schedule, t: int) -> float:
    alpha_bar = _alpha_bar(schedule, t)
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def _noise_of(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    return (schedule.at("recip_alpha", t) * x_t - x0) / schedule.at("noise_to_signal", t)
