"""The one table of tolerances: how far a backend may be from the fp32 reference."""

from __future__ import annotations

import torch
from torch import Tensor

# Absolute, for values of size 1. fp32: a few roundings in another order. 16 bits: one rounding
# of the result, half an ulp of a value below 2, on top.
ABSOLUTE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_matches(
    actual: Tensor, exact: Tensor, plain: Tensor | None = None, scale: float | None = None
) -> None:
    """`actual` agrees with the fp32 (or fp64) reference `exact`.

    Args:
        actual: what the backend returned.
        exact: the reference on the same (already rounded) inputs, computed in fp32 or fp64.
        plain: the same formula in plain PyTorch at the dtype of `actual`. 16-bit results may have
            twice its error.
        scale: size of the values that the tolerance refers to; default: the largest of `exact`.
    """
    assert actual.shape == exact.shape
    assert bool(actual.isfinite().all()), "not every element was written, or one is not finite"
    if not actual.numel():
        return
    size = max(float(exact.abs().max()), 1e-30) if scale is None else scale
    allowed = ABSOLUTE[actual.dtype] * size
    error = float((actual.double() - exact.double()).abs().max())
    if plain is not None and actual.dtype != torch.float32:
        plain_error = float((plain.double() - exact.double()).abs().max())
        allowed = max(2 * plain_error, ABSOLUTE[torch.float32] * size)
    assert error <= allowed, f"error {error:.3g} > {allowed:.3g}"
