from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dlmone_fast.errors import BackendUnavailableError, UsageError
from dlmone_fast.kernels.blocks import (
    add_layer_norm,
    bias_gelu,
    bias_tanh,
    input_layer_norm,
    op,
    reference,
)
from dlmone_fast.kernels.triton import support
from dlmone_fast.networks.layers import LAYER_NORM_EPS
from tests.kernels.tolerances import assert_matches

BACKENDS = ("torch", "triton")
EPS = LAYER_NORM_EPS
WIDTHS = (1, 2, 7, 32, 129, 768, 4096)
KINDS = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
ACTIVATIONS: list[tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = [
    (bias_gelu, reference.bias_gelu, F.gelu),
    (bias_tanh, reference.bias_tanh, torch.tanh),
]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def comparison(backend: str, plain: Tensor) -> Tensor | None:
    """`plain`, or None where Triton's interpreter truncates to bf16: a whole ulp, not half."""
    truncates = backend == "triton" and support.interpreting() and plain.dtype == torch.bfloat16
    return None if truncates else plain


def norm_arguments(
    hidden: int, device: torch.device, parameters: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    weight, bias = 1 + 0.2 * random(hidden, seed=5), random(hidden, seed=6)
    return weight.to(device, parameters), bias.to(device, parameters)


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("return_sum", [False, True])
def test_add_layer_norm(backend: str, hidden: int, return_sum: bool, device: torch.device) -> None:
    x, residual = (random(3, 5, hidden, seed=seed).to(device) for seed in (0, 1))
    weight, bias = norm_arguments(hidden, device)
    # A width of 1 or 2 has rows of nearly equal values: only eps makes those comparable.
    eps = EPS if hidden > 2 else 1e-3
    exact, exact_sum = reference.add_layer_norm(x, residual, weight, bias, eps)
    got = add_layer_norm(
        x, residual, weight, bias, eps, return_sum=return_sum, kernel_backend=backend
    )
    normed, total = got if isinstance(got, tuple) else (got, None)
    assert_matches(normed, exact)
    assert (total is not None) == return_sum
    if total is not None:
        assert torch.equal(total, x + residual)
        assert_matches(total, exact_sum)
    torch.testing.assert_close(normed, F.layer_norm(x + residual, (hidden,), weight, bias, eps))


@pytest.mark.parametrize(("dtype", "parameters"), KINDS)
@pytest.mark.parametrize("hidden", [48, 200])
def test_layer_norms_in_every_dtype(
    backend: str, dtype: torch.dtype, parameters: torch.dtype, hidden: int, device: torch.device
) -> None:
    x = random(2, 6, hidden).to(device, dtype)
    residual = random(2, 6, hidden, seed=1).to(device, dtype)
    weight, bias = norm_arguments(hidden, device, parameters)
    exact, exact_sum = reference.add_layer_norm(x, residual, weight, bias, EPS)
    normed, total = add_layer_norm(
        x, residual, weight, bias, EPS, return_sum=True, kernel_backend=backend
    )
    own = (weight.to(dtype), bias.to(dtype))
    rough = F.layer_norm(x + residual, (hidden,), *own, EPS)
    assert normed.dtype == total.dtype == dtype
    assert_matches(normed, exact, comparison(backend, rough))
    assert_matches(total, exact_sum, comparison(backend, x + residual))
    position = random(9, hidden, seed=2).to(device, parameters)
    time = random(2, hidden, seed=3).to(device, dtype)
    exact = reference.input_layer_norm(x, position, time, weight, bias, EPS)
    rough = F.layer_norm(x + position[:6].to(dtype) + time[:, None], (hidden,), *own, EPS)
    got = input_layer_norm(x, position, time, weight, bias, EPS, kernel_backend=backend)
    assert got.dtype == dtype
    assert_matches(got, exact, comparison(backend, rough))


@pytest.mark.parametrize("hidden", [1, 33, 256, 1000])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7)])
def test_input_layer_norm(
    backend: str, hidden: int, batch: int, length: int, device: torch.device
) -> None:
    projected = random(batch, length, hidden).to(device)
    position = random(length + 3, hidden, seed=1).to(device)
    time = random(batch, hidden, seed=2).to(device)
    weight, bias = norm_arguments(hidden, device)
    eps = EPS if hidden > 1 else 1e-3
    exact = reference.input_layer_norm(projected, position, time, weight, bias, eps)
    got = input_layer_norm(projected, position, time, weight, bias, eps, kernel_backend=backend)
    assert_matches(got, exact)
    added = projected + position[:length] + time[:, None]
    torch.testing.assert_close(got, F.layer_norm(added, (hidden,), weight, bias, eps))


@pytest.mark.parametrize("hidden", [1, 33, 768, 1024])
def test_rows_of_equal_values_give_the_bias_exactly(
    backend: str, hidden: int, device: torch.device
) -> None:
    # 1e-12 is far below the square of a rounding error of these means.
    values = torch.tensor([0.0, 0.1, -1 / 3, 1e3 / 7, 1e6 / 7], device=device)
    x = values[:, None].expand(5, hidden)
    weight, bias = norm_arguments(hidden, device)
    zero = torch.zeros_like(x)
    got = add_layer_norm(x, zero, weight, bias, EPS, kernel_backend=backend)
    assert torch.equal(got, bias.expand(5, hidden))
    position, time = torch.zeros(5, hidden, device=device), torch.zeros(1, hidden, device=device)
    got = input_layer_norm(x[None], position, time, weight, bias, EPS, kernel_backend=backend)
    assert torch.equal(got[0], bias.expand(5, hidden))


@pytest.mark.parametrize("hidden", [100, 768])
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_what_a_large_mean_costs(
    backend: str, mean: float, hidden: int, device: torch.device
) -> None:
    x = (mean + random(8, hidden)).to(device)
    weight, bias = torch.ones(hidden, device=device), torch.zeros(hidden, device=device)
    zero = torch.zeros_like(x)
    # Nothing, or what the module says of torch.
    allowed = 3e-7 * mean if backend == "torch" else 1e-6
    exact, _ = reference.add_layer_norm(x, zero, weight, bias, EPS)
    got = add_layer_norm(x, zero, weight, bias, EPS, kernel_backend=backend)
    assert float((got - exact).abs().max()) < allowed
    scaled, _ = reference.add_layer_norm(1e4 * x, zero, weight, bias, EPS)
    got = add_layer_norm(1e4 * x, zero, weight, bias, EPS, kernel_backend=backend)
    assert float((got - scaled).abs().max()) < allowed


def test_nearly_equal_values_are_told_apart(backend: str, device: torch.device) -> None:
    if backend == "torch":
        pytest.skip("a mean of 10^6 deviations: beyond what torch's layer_norm resolves on CPUs")
    x = 1 + 2.0**-23 * torch.tensor([[0, 1, 2, 3, 0, 7, 1]], device=device)
    weight, bias = torch.ones(7, device=device), torch.zeros(7, device=device)
    exact, _ = reference.add_layer_norm(x, torch.zeros_like(x), weight, bias, EPS)
    got = add_layer_norm(x, torch.zeros_like(x), weight, bias, EPS, kernel_backend=backend)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize(("operation", "exact", "plain"), ACTIVATIONS, ids=["gelu", "tanh"])
@pytest.mark.parametrize(("dtype", "parameters"), KINDS)
@pytest.mark.parametrize("hidden", [1, 64, 300])
def test_activations(
    backend: str,
    operation: Any,
    exact: Any,
    plain: Any,
    dtype: torch.dtype,
    parameters: torch.dtype,
    hidden: int,
    device: torch.device,
) -> None:
    x = (3 * random(2, 5, hidden)).to(device, dtype)
    bias = random(hidden, seed=1).to(device, parameters)
    got = operation(x, bias, kernel_backend=backend)
    assert got.dtype == dtype
    rough = plain(x + bias.to(dtype))
    assert_matches(got, exact(x, bias), comparison(backend, rough))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")
def test_tanh_is_relatively_accurate_everywhere(backend: str, device: torch.device) -> None:
    parts = torch.logspace(-30, 0, 3000), torch.linspace(0.5, 0.75, 3000), torch.arange(1, 50, 0.01)
    sizes = torch.cat(parts)
    x = torch.cat([sizes, -sizes]).view(-1, 4).to(device)
    bias = torch.zeros(4, device=device)
    got = bias_tanh(x, bias, kernel_backend=backend).double()
    exact = torch.tanh(x.double())
    assert float(((got - exact) / exact).abs().max()) < 4 * 2.0**-24
    limits = torch.tensor([0.0, 200.0, -200.0, torch.inf, -torch.inf, torch.nan], device=device)
    got = bias_tanh(limits, torch.zeros(6, device=device), kernel_backend=backend)
    assert got[:5].tolist() == [0, 1, -1, 1, -1]
    assert bool(got[5].isnan())


def test_gelu_at_the_ends(backend: str, device: torch.device) -> None:
    x = torch.tensor([0.0, 40.0, -40.0, torch.nan, -1.0], device=device)
    got = bias_gelu(x, torch.zeros(5, device=device), kernel_backend=backend)
    assert got[:3].tolist() == [0, 40, 0]
    assert bool(got[3].isnan())
    assert float(got[4]) == pytest.approx(-0.15865525, abs=1e-7)


def test_a_row_that_is_not_a_number_spoils_no_other(backend: str, device: torch.device) -> None:
    x, residual = random(9, 20).to(device), random(9, 20, seed=1).to(device)
    weight, bias = norm_arguments(20, device)
    clean = add_layer_norm(x, residual, weight, bias, EPS, kernel_backend=backend)
    x[4, 3] = torch.nan
    got = add_layer_norm(x, residual, weight, bias, EPS, kernel_backend=backend)
    assert bool(got[4].isnan().all())
    others = [row for row in range(9) if row != 4]
    assert torch.equal(got[others], clean[others])


def test_strided_views_and_any_leading_shape(backend: str, device: torch.device) -> None:
    storage = random(2, 3, 4, 80).to(device)
    weight, bias = norm_arguments(24, device)
    views = [
        storage[..., 8:32],
        storage[..., ::2][..., :24],
        storage.transpose(0, 2)[..., :24],
        storage[:, :, :1, :24].expand(2, 3, 4, 24),
        storage[0, 0, 0, :24],
        storage[0, :0, :, :24],
    ]
    for view in views:
        residual = view.flip(-1)
        got, total = add_layer_norm(
            view, residual, weight, bias, EPS, return_sum=True, kernel_backend=backend
        )
        assert_matches(got, reference.add_layer_norm(view, residual, weight, bias, EPS)[0])
        assert torch.equal(total, view + residual)
        swapped = add_layer_norm(residual, view, weight, bias, EPS, kernel_backend=backend)
        assert torch.equal(swapped, got)
        assert_matches(
            bias_gelu(view, bias, kernel_backend=backend), reference.bias_gelu(view, bias)
        )
        assert got.is_contiguous()
    table, times = storage.flatten(0, 2)[::2, 8:32], storage[:, 0, 0, 24:48]
    projected = storage[:, :, 1, 40:64]
    got = input_layer_norm(projected, table, times, weight, bias, EPS, kernel_backend=backend)
    exact = reference.input_layer_norm(projected, table, times, weight, bias, EPS)
    assert_matches(got, exact)


def test_two_runs_agree_to_the_bit(backend: str, device: torch.device) -> None:
    x, residual = random(5, 700).to(device), random(5, 700, seed=1).to(device)
    weight, bias = norm_arguments(700, device)
    runs = [add_layer_norm(x, residual, weight, bias, EPS, kernel_backend=backend) for _ in "ab"]
    assert torch.equal(*runs)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_empty(backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    x, ones = torch.zeros(shape, device=device), torch.ones(8, device=device)
    normed, total = add_layer_norm(x, x, ones, ones, EPS, return_sum=True, kernel_backend=backend)
    assert normed.shape == total.shape == shape
    assert bias_tanh(x, ones, kernel_backend=backend).shape == shape
    if len(shape) == 3:
        time = torch.zeros(3, 8, device=device)
        table = torch.zeros(0, 8, device=device)
        got = input_layer_norm(x, table, time, ones, ones, EPS, kernel_backend=backend)
        assert got.shape == shape


def test_compiles_as_one_graph(backend: str, device: torch.device) -> None:
    x, residual = random(2, 5, 24).to(device), random(2, 5, 24, seed=1).to(device)
    weight, bias = norm_arguments(24, device)

    def chain(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        entered = input_layer_norm(
            x, residual[0], x[:, 0], weight, bias, EPS, kernel_backend=backend
        )
        normed, total = add_layer_norm(
            bias_gelu(entered, bias, kernel_backend=backend), residual, weight, bias, EPS,
            return_sum=True, kernel_backend=backend,
        )  # fmt: skip
        alone = add_layer_norm(x, residual, weight, bias, EPS, kernel_backend=backend)
        assert isinstance(alone, Tensor)
        return bias_tanh(normed, bias, kernel_backend=backend), total, alone

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    for a, b in zip(chain(x, residual), compiled(x, residual), strict=True):
        assert torch.equal(a, b)


def test_operators_do_what_their_traces_say(backend: str, device: torch.device) -> None:
    x, checks = random(3, 2, 8).to(device).transpose(0, 1), ("test_schema", "test_faketensor")
    weight, bias = norm_arguments(8, device)
    for wanted in (True, False):
        arguments = (x, x.clone(), weight, bias, EPS, wanted, backend)
        torch.library.opcheck(op._add_layer_norm.custom_op, arguments, test_utils=checks)
    entered = (x, x[0].clone(), x[:, 0].clone(), weight, bias, EPS, backend)
    torch.library.opcheck(op._input_layer_norm.custom_op, entered, test_utils=checks)
    for activation in (op._bias_gelu, op._bias_tanh):
        torch.library.opcheck(activation.custom_op, (x, bias, backend), test_utils=checks)


def test_a_gradient_is_refused_and_no_grad_is_the_way_out(
    backend: str, device: torch.device
) -> None:
    x, ones = torch.ones(2, 8, device=device), torch.ones(8, device=device).requires_grad_()
    for run in (
        lambda: add_layer_norm(x, x, ones, ones, EPS, kernel_backend=backend),
        lambda: bias_gelu(x, ones, kernel_backend=backend),
        lambda: bias_tanh(x, ones, kernel_backend=backend),
        lambda: input_layer_norm(x[None], x, x[:1], ones, ones, EPS, kernel_backend=backend),
    ):
        with pytest.raises(UsageError, match=r"requires a gradient.*inference_mode"):
            run()
        for way_out in (torch.no_grad, torch.inference_mode):
            with way_out():
                assert bool(run().isfinite().all())


def test_a_backend_that_cannot_run_is_refused(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, ones = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(BackendUnavailableError, match="has no such backend"):
        bias_gelu(x, ones, kernel_backend="cpp")
    monkeypatch.setattr(support, "_installed", lambda: False)
    if backend == "triton":
        with pytest.raises(BackendUnavailableError, match=r"triton is not installed.*torch"):
            bias_gelu(x, ones, kernel_backend=backend)
    else:
        assert torch.equal(bias_gelu(x, ones), bias_gelu(x, ones, kernel_backend=backend))


X, W = torch.zeros(2, 3, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("run", "change", "message"),
    [
        (add_layer_norm, {"x": torch.zeros(())}, r"x must have shape \[\.\.\., H\]"),
        (add_layer_norm, {"x": torch.zeros(2, 4097)}, r"H <= 4096, got \(2, 4097\)"),
        (add_layer_norm, {"x": X.double()}, r"x must be float32.*\.float\(\)"),
        (add_layer_norm, {"residual": X[0]}, r"residual must have shape \(2, 3, 4\), got \(3, 4\)"),
        (add_layer_norm, {"residual": X.half()}, "residual must be torch.float32 here"),
        (add_layer_norm, {"weight": torch.ones(5)}, r"weight must have shape \(4,\), got \(5,\)"),
        (add_layer_norm, {"bias": W.half()}, "bias must be torch.float32 here"),
        (add_layer_norm, {"bias": W.to("meta")}, "bias is on meta"),
        (add_layer_norm, {"eps": 0.0}, r"eps must lie in.*got 0\.0"),
        (add_layer_norm, {"eps": float("nan")}, "eps must lie in"),
        (input_layer_norm, {"projected": X[0]}, r"projected must have shape \[B, L, H\]"),
        (input_layer_norm, {"position": X[0, :2]}, r"position must have shape.*L >= 3"),
        (input_layer_norm, {"position": X[0].half()}, "position must be torch.float32"),
        (input_layer_norm, {"time": X[:, 0, :3]}, r"time must have shape \(2, 4\)"),
        (bias_gelu, {"bias": W[:3]}, r"bias_gelu: bias must have shape \(4,\)"),
        (bias_tanh, {"x": X.long()}, "bias_tanh: x must be float32"),
        (bias_tanh, {"x": X[..., :0]}, "x must have shape"),
    ],
)
def test_refusals_name_the_argument(
    backend: str, run: Any, change: dict[str, Any], message: str
) -> None:
    given: dict[Any, dict[str, Any]] = {
        add_layer_norm: {"x": X, "residual": X, "weight": W, "bias": W, "eps": EPS},
        input_layer_norm: {
            "projected": X, "position": X[0], "time": X[:, 0], "weight": W, "bias": W, "eps": EPS
        },
        bias_gelu: {"x": X, "bias": W},
        bias_tanh: {"x": X, "bias": W},
    }  # fmt: skip
    with pytest.raises(UsageError, match=message):
        run(**{**given[run], **change}, kernel_backend=backend)
