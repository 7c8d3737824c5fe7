"""Every GPU kernel at its smallest shapes, and at ones that end within a tile.

`python kernel_cases.py DEVICE` runs them once and prints what ran, for tools that watch a process.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dlmone_fast.kernels import blocks, dispatch
from dlmone_fast.kernels.distillation_loss import distillation_loss
from dlmone_fast.kernels.forward_diffusion import forward_diffusion, forward_diffusion_of_tokens
from dlmone_fast.kernels.linear_cross_entropy import linear_cross_entropy
from dlmone_fast.kernels.nearest_token import nearest_token, nearest_token_with_margin
from dlmone_fast.kernels.noise import Stream, draws_of, normal, words_of_draws

Results = list[Tensor]
Run = Callable[[torch.device, str], Results]

EPS = 1e-5


def _drawn(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=numbers).to(device)


def _leaf(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return _drawn(device, *shape, seed=seed).requires_grad_()


def _ids(device: torch.device, most: int, *shape: int) -> Tensor:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(1)).to(device)


def _mask(device: torch.device, *shape: int) -> Tensor:
    """Half of the positions, the last one among them."""
    mask = torch.arange(shape[0] * shape[1]).view(shape) % 2
    mask[:, -1] = 1
    return mask.to(device)


def _with_gradients(results: Results, *leaves: Tensor) -> Results:
    """The results, and what the leaves get of a sum with unequal parts."""
    scales = torch.arange(1.0, 1 + results[0].numel(), device=results[0].device)
    (results[0].float() * scales.view(results[0].shape)).sum().backward()
    return [result.detach() for result in results] + [leaf.grad for leaf in leaves]  # type: ignore[misc]


def _noise(rows: int, length: int, width: int, device: torch.device, backend: str) -> Results:
    seeds = [2**63 + row for row in range(rows)]
    return [normal(seeds, Stream.GENERATION, 0, 1, length, width, device, kernel_backend=backend)]


def _words(rows: int, count: int, device: torch.device, backend: str) -> Results:
    draws = draws_of(list(range(rows)), 3, 2**32 - 1, device)
    return [words_of_draws(draws, Stream.GENERATION, count, kernel_backend=backend)]


def _diffusion(rows: int, length: int, width: int, device: torch.device, backend: str) -> Results:
    x0 = _leaf(device, rows, length, width)
    alpha, sigma = torch.full((2, rows), 0.6, device=device)
    x_t = forward_diffusion(
        x0, alpha, sigma, _mask(device, rows, length), list(range(rows)), Stream.GENERATION, 0, 0,
        kernel_backend=backend,
    )  # fmt: skip
    return _with_gradients([x_t], x0)


def _of_tokens(rows: int, length: int, width: int, device: torch.device, backend: str) -> Results:
    table = _leaf(device, 7, width)
    alpha, sigma = torch.full((2, rows), 0.6, device=device)
    x_t = forward_diffusion_of_tokens(
        _ids(device, 7, rows, length), table, alpha, sigma, None, list(range(rows)),
        Stream.GENERATION, 0, 0, kernel_backend=backend,
    )  # fmt: skip
    return _with_gradients([x_t], table)


def _distillation(
    form: str, rows: int, length: int, width: int, device: torch.device, backend: str
) -> Results:
    x, teacher, score = (_leaf(device, rows, length, width, seed=seed) for seed in range(3))
    loss, weight = distillation_loss(
        x, teacher, score, _mask(device, rows, length), form=form, mu=1.2, weight_floor=0.05,
        multiplier=torch.full((rows,), 0.5, device=device), kernel_backend=backend,
    )  # fmt: skip
    wanted = (x, teacher, score) if form == "sid" else (x,)
    return _with_gradients([loss, weight], *wanted)


def _cross_entropy(n: int, words: int, width: int, device: torch.device, backend: str) -> Results:
    h, table, bias = (
        _leaf(device, n, width),
        _leaf(device, words, width, seed=1),
        _leaf(device, words),
    )
    losses = linear_cross_entropy(
        h, table, _ids(device, words, n), bias, mask=_mask(device, 1, n)[0], kernel_backend=backend
    )
    return _with_gradients([losses], h, table, bias)


def _blocks(length: int, width: int, device: torch.device, backend: str) -> Results:
    x, residual = _drawn(device, 2, length, width), _drawn(device, 2, length, width, seed=1)
    weight, bias = _drawn(device, width, seed=2), _drawn(device, width, seed=3)
    position, time = _drawn(device, length, width, seed=4), _drawn(device, 2, width, seed=5)
    chosen = {"kernel_backend": backend}
    return [
        *blocks.add_layer_norm(x, residual, weight, bias, EPS, return_sum=True, **chosen),
        blocks.input_layer_norm(x, position, time, weight, bias, EPS, **chosen),
        blocks.bias_gelu(x, bias, **chosen),
        blocks.bias_tanh(x, bias, **chosen),
    ]  # type: ignore[list-item]


def _rounding(n: int, words: int, width: int, device: torch.device, backend: str) -> Results:
    x, table = _drawn(device, n, width), _drawn(device, words, width, seed=1)
    # Equals: the second of them is decided in fp64.
    table[words // 2] = table[0]
    ids, margin = nearest_token_with_margin(x, table, kernel_backend=backend)
    return [nearest_token(x, table, kernel_backend=backend), ids, margin]


CASES: dict[str, tuple[str, Run]] = {
    f"{name} {'×'.join(map(str, shape))}": (operation, functools.partial(run, *shape))
    for name, operation, run, shapes in (
        ("noise", "noise", _noise, [(1, 1, 1), (2, 3, 67)]),
        ("words", "noise_bits", _words, [(1, 1), (2, 130)]),
        ("forward diffusion", "forward_diffusion", _diffusion, [(1, 1, 1), (2, 5, 67)]),
        ("of tokens", "forward_diffusion", _of_tokens, [(1, 1, 1), (2, 5, 67)]),
        ("sid", "distillation_loss", functools.partial(_distillation, "sid"),
         [(1, 1, 1), (2, 5, 67), (1, 129, 257)]),
        ("kl", "distillation_loss", functools.partial(_distillation, "kl"),
         [(1, 1, 1), (2, 5, 67)]),
        ("cross-entropy", "linear_cross_entropy", _cross_entropy, [(1, 1, 1), (17, 131, 19)]),
        ("blocks", "add_layer_norm", _blocks, [(1, 1), (3, 67)]),
        ("rounding", "nearest_token", _rounding, [(1, 1, 1), (9, 259, 19), (3, 140, 130)]),
    )
    for shape in shapes
}  # fmt: skip
"""By name, the operation whose backends may run it, and the call."""

COMPILED = ("cuda", "triton")


def runnable(device: torch.device) -> list[tuple[str, str]]:
    """Names of cases, each with a backend of hand-written kernels that can run it here."""
    like = torch.zeros(1, 1, device=device)
    return [
        (name, backend.name)
        for name, (operation, _) in CASES.items()
        for backend in dispatch.backends(operation)
        if backend.name in COMPILED and backend.usable(like, like) is None
    ]


@contextmanager
def launches() -> Iterator[set[str]]:
    """Names of the Triton kernels that are launched within the block."""
    from dlmone_fast.kernels.triton import aot

    launched: set[str] = set()
    replaced = []
    for module in aot.kernel_modules():
        for kernel in {
            id(build.kernel): build.kernel for build in getattr(module, "SHIPPED", ())
        }.values():
            name = kernel.__name__
            replaced.append((module, name, kernel))
            setattr(module, name, _Recorded(kernel, launched))
    try:
        yield launched
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)


class _Recorded:
    """A kernel that notes its launch."""

    def __init__(self, kernel: Any, launched: set[str]) -> None:
        self._kernel, self._launched = kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        self._launched.add(self._kernel.__name__)
        return self._kernel[grid]


def main() -> None:
    device = torch.device(sys.argv[1])
    ran = runnable(device)
    with launches() as launched:
        for name, backend in ran:
            CASES[name][1](device, backend)
    if device.type == "cuda":
        torch.cuda.synchronize()
    json.dump({"ran": ran, "triton": sorted(launched)}, sys.stdout)
    print(flush=True)


if __name__ == "__main__":
    main()
