"""A wrong result is recognised before it is timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import checks


def test_one_wrong_id_is_found():
    exact = torch.arange(6)
    assert checks.same_ids(exact)(exact.view(2, 3)) is None
    assert checks.same_ids(exact)(torch.tensor([0, 1, 2, 3, 4, 0])) == "1 of 6 ids differ"


def test_equally_near_rows_are_no_inputs():
    with pytest.raises(ValueError, match="equally near"):
        checks.nearest_ids(torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_agree_to_their_precision(dtype: torch.dtype):
    exact = torch.linspace(-3, 3, 64, dtype=torch.float64).view(8, 8)
    assert checks.close_to(exact)(exact.to(dtype)) is None
    assert "is off by" in (checks.close_to(exact)((exact * 1.05).to(dtype)) or "")
    # The first rows stand for all, except that nothing may be left unwritten.
    assert checks.close_to(exact[:2])(exact.to(dtype)) is None
    unwritten = exact.to(dtype).index_fill(0, torch.tensor([7]), torch.nan)
    assert "not finite" in (checks.close_to(exact[:2])(unwritten) or "")
    assert "shape" in (checks.close_to(exact)(exact[:, :4].to(dtype)) or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_of_another_distribution_is_found(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 18, generator=generator)
    check = checks.standard_normal()
    assert check(noise.to(dtype)) is None
    assert "mean" in (check((noise + 0.05).to(dtype)) or "")
    assert "variance" in (check((1.05 * noise).to(dtype)) or "")
    uniform = (torch.rand(1 << 18, generator=generator) - 0.5) * 12**0.5
    assert "fourth moment" in (check(uniform.to(dtype)) or "")


def test_noise_on_source_positions_is_found():
    x0, ones = torch.zeros(2, 4, 4096), torch.ones(2)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1]] * 2)
    check = checks.diffused(x0, ones, ones, mask)
    assert check(noise * mask[..., None]) is None
    assert check(noise) == "source positions changed"
