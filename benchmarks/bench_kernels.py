"""Kernels beside what one would write without them; a wrong result is never timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlmone_fast.kernels import native
from dlmone_fast.kernels.nearest_token import nearest_token

VOCABULARY, WIDTH = 30_522, 128


def _matmul_argmin(x: Tensor, table: Tensor, norms: Tensor) -> Tensor:
    return torch.addmm(norms, x, table.T, beta=1, alpha=-2).argmin(1)


def _implementations(table: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    norms = table.square().sum(1)
    ours = {
        f"dlmone_fast {name}": lambda x, name=name: nearest_token(x, table, kernel_backend=name)
        for name in ("cpp", "torch")
        if name != "cpp" or native.is_available()
    }
    return {**ours, "matmul + argmin, norms precomputed": lambda x: _matmul_argmin(x, table, norms)}


@pytest.mark.parametrize("name", ["dlmone_fast cpp", "dlmone_fast torch",
                                  "matmul + argmin, norms precomputed"])  # fmt: skip
@pytest.mark.parametrize("tokens", [128, 1024])
def test_rounding(benchmark, name: str, tokens: int) -> None:  # type: ignore[no-untyped-def]
    """Nearest-token rounding, BERT's vocabulary."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, WIDTH, generator=generator)
    ids = torch.randint(VOCABULARY, (tokens,), generator=generator)
    x = table[ids] + 0.5 * torch.randn(tokens, WIDTH, generator=generator)
    implementation = _implementations(table).get(name)
    if implementation is None:
        pytest.skip(f"{name}: {native.why_missing()}")
    exact = torch.cdist(x.double(), table.double()).argmin(1)
    assert torch.equal(implementation(x), exact), f"{name} is wrong: not timed"
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark(implementation, x)
