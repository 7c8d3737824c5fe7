"""The anchor of θ to the teacher's own answer from the same noise.

A teacher's deterministic sampler maps a noise z and a source to one text y. Learning that map in
one call keeps distinct z at distinct texts and forbids collapse onto one of them; what it cannot
give is better texts than a regression's, which is why the weight ends at zero.
"""

from __future__ import annotations

from torch import Tensor

from dlmone_fast.losses.teacher import token_losses
from dlmone_fast.networks import TokenEmbedding


def anchor_loss(
    tokens: TokenEmbedding,
    table: Tensor,
    x: Tensor,
    ids: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    mse_weight: float,
) -> Tensor:
    """Loss [B]: the mean over target positions of CE(decoder(x), y) + mse_weight F² (x - E(y))².

    The teacher's own terms (`losses/teacher.py`), with x = G_θ(z, source) in the place of its
    prediction; the square is a mean over the embedding's channels.

    Args:
        tokens: decoder and noise-scale factor F.
        table: E [V, d], its table.
        x: [B, L, d].
        ids: y [B, L].
        mask: [B, L], 0 on source positions.
        weights: of positions [B, L], for a weighted mean; None: 1 each.
        mse_weight: weight of the square.
    """
    losses = token_losses(tokens, x, ids, mask)
    if mse_weight:
        square = (x - table[ids]).square().mean(-1)
        losses = losses + mse_weight * tokens.noise_scale**2 * square
    kept = (mask != 0).to(losses.dtype)
    if weights is not None:
        kept = kept * weights
    # Behind a text's end weights may all be 0, never before it; an empty row counts nothing.
    return (losses * kept).sum(1) / kept.sum(1).clamp(min=1e-6)
