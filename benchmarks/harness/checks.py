"""Checks that a result must pass before its time is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Check = Callable[[Any], str | None]

# Of the largest magnitude. fp32: other orders of summation. 16 bits: two roundings of the result,
# which plain PyTorch has where it rounds an intermediate one.
_TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_SCORES_PER_PASS = 1 << 27


def nearest_ids(x: Tensor, table: Tensor) -> Tensor:
    """The ids [N] of the nearest rows by fp64 scores.

    Raises:
        ValueError: a choice is so close that fp64 scores do not settle it.
    """
    wide, ids = table.double(), []
    half_norms = 0.5 * wide.square().sum(1)
    for part in x.split(max(1, _SCORES_PER_PASS // len(table))):
        scores = torch.addmm(half_norms, part.double(), wide.T, alpha=-1)
        best = scores.topk(min(2, len(table)), dim=1, largest=False)
        gap = (best.values[:, -1] - best.values[:, 0]).min() if len(table) > 1 else torch.inf
        if gap <= 1e-9 * float(half_norms.max()):
            raise ValueError("two rows are equally near: other inputs are needed")
        ids.append(best.indices[:, 0])
    return torch.cat(ids)


def same_ids(exact: Tensor) -> Check:
    """All ids are the exact ones."""

    def check(ids: Tensor) -> str | None:
        wrong = int((ids.reshape(-1) != exact).sum())
        return f"{wrong} of {len(exact)} ids differ" if wrong else None

    return check


def close_to(*expected: Tensor) -> Check:
    """Every tensor of the result agrees with its fp64 reference, and all of it is finite.

    A reference may hold the first rows only: rows of a large batch are computed alike.
    """

    def check(result: Any) -> str | None:
        found = result if isinstance(result, tuple | list) else (result,)
        for place, (actual, exact) in enumerate(zip(found, expected, strict=True)):
            part = actual[: len(exact)] if exact.dim() else actual
            if part.shape != exact.shape:
                return f"result {place} has shape {tuple(actual.shape)}"
            if not bool(actual.isfinite().all()):
                return f"result {place} is not finite everywhere"
            tolerance = _TOLERANCES[actual.dtype] * max(float(exact.abs().max()), 1e-30)
            error = float((part.double() - exact.double()).abs().max())
            if error > tolerance:
                return f"result {place} is off by {error:.3g}, {tolerance:.3g} is allowed"
        return None

    return check


def standard_normal() -> Check:
    """Mean, variance and fourth moment of N(0, 1), each within six standard errors."""

    def check(result: Tensor) -> str | None:
        values = result.float()
        size = values.numel()
        for name, sample, expected, spread in (
            ("mean", values.mean(), 0.0, 1.0),
            ("variance", values.square().mean(), 1.0, 2.0),
            ("fourth moment", values.square().square().mean(), 3.0, 96.0),
        ):
            # bf16 rounds to 2^-9: a bias of up to that on a moment is not the noise's.
            allowed = 6 * (spread / size) ** 0.5 + (2.0**-7 if result.dtype != torch.float32 else 0)
            if not abs(float(sample) - expected) <= allowed:
                return f"the {name} is {float(sample):.4f}, not {expected}"
        return None

    return check


def diffused(x0: Tensor, alpha: Tensor, sigma: Tensor, mask: Tensor) -> Check:
    """x_t has standard normal noise where the mask is not 0, and is x_0 elsewhere."""

    def check(x_t: Tensor) -> str | None:
        target = (mask != 0)[..., None].expand_as(x0)
        if not torch.equal(x_t[~target], x0[~target]):
            return "source positions changed"
        noise = (x_t.float() - alpha[:, None, None] * x0.float()) / sigma[:, None, None]
        return standard_normal()(noise[target].to(x_t.dtype))

    return check
