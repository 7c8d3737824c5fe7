"""Score distillation: the SiD loss of θ (DLM-One Eq. 4) and the score matching of ψ (Eq. 3).

x is the generator's output, x̂_φ and x̂_ψ the predictions of teacher and score estimator for the
same x_t. All means run over target positions; the source is given.
"""

from __future__ import annotations

from torch import Tensor

from dlmone_fast.losses.teacher import masked_mean


def sid_weight(x: Tensor, x0_teacher: Tensor, mask: Tensor, floor: float) -> Tensor:
    """The denominator w [B] of the SiD loss: mean |x - x̂_φ|, at least `floor`, no gradient.

    DLM-One leaves ω_t open; SiD, SiDA, SiD-LSG and SFD all set ω_t alpha_t² / sigma_t⁴ to 1 / w.
    """
    return masked_mean((x - x0_teacher).abs(), mask).clamp(min=floor).detach()


def sid_loss(
    x: Tensor, x0_teacher: Tensor, x0_score: Tensor, mask: Tensor, mu: float, weight: Tensor
) -> Tensor:
    """SiD loss [B] (Eq. 4): mean of (1 - μ) A² + A·R over target entries, divided by w.

    With A = x̂_φ - x̂_ψ and R = x̂_ψ - x this equals A·((x̂_φ - x) - μ A). Gradients reach x and,
    through both predictions, x_t; the parameters of φ and ψ are frozen by the caller. The loss may
    be negative: it is no measure of progress.
    """
    a, r = x0_teacher - x0_score, x0_score - x
    return masked_mean((1 - mu) * a * a + a * r, mask) / weight


def score_matching_loss(x: Tensor, x0_score: Tensor, mask: Tensor) -> Tensor:
    """Denoising score matching [B] of ψ on generated x (Eq. 3), as mean squared error of x̂0.

    γ_t = 1: ψ is trained with the loss that the teacher was trained with.
    """
    return masked_mean((x - x0_score).square(), mask)
