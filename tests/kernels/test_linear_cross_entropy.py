from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dlmone_fast.errors import BackendUnavailableError, UsageError
from dlmone_fast.kernels import dispatch
from dlmone_fast.kernels.linear_cross_entropy import linear_cross_entropy, reference
from dlmone_fast.kernels.linear_cross_entropy import torch as tiles
from dlmone_fast.kernels.triton import support
from tests.kernels.tolerances import assert_matches

# The torch backend by the size of the problem: the plain formula, then "kept", then "tiles".
VARIANTS = ("torch", "kept", "tiles", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=VARIANTS)
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> str:
    if request.param in ("kept", "tiles"):
        monkeypatch.setattr(tiles, "PLAIN_LOGITS", 0)
    if request.param == "kept":
        return "torch"
    if request.param == "tiles":
        monkeypatch.setattr(tiles, "_KEPT_LOGITS", 0)
        monkeypatch.setattr(tiles, "_TILE_TOKENS", 48)
        monkeypatch.setattr(tiles, "_TILE_LOGITS", 48 * 70)
        return "torch"
    if request.param == "triton":
        needs_triton(device)
    return request.param


def needs_triton(device: torch.device) -> None:
    reason = support.usable(torch.zeros(1, device=device))
    if reason:
        pytest.skip(reason)


class Case:
    """Inputs with gradients, half of the positions selected, junk at the others."""

    def __init__(
        self, n: int, v: int, d: int, dtype: torch.dtype, device: torch.device, masked: bool = True
    ) -> None:
        random = torch.Generator().manual_seed(n * 7919 + v * 31 + d)

        def draw(*shape: int, size: float = 1.0) -> Tensor:
            values = (size * torch.randn(*shape, generator=random)).to(device, dtype)
            return values.requires_grad_()

        # Logits of size 1 whatever the width.
        self.h, self.embedding, self.bias = draw(n, d, size=d**-0.5), draw(v, d), draw(v)
        self.targets = torch.randint(0, v, (n,), generator=random).to(device)
        self.gradient = torch.randn(n, generator=random).to(device)
        self.mask = None
        if masked:
            self.mask = (torch.rand(n, generator=random) < 0.5).to(device)
            self.targets[~self.mask] = -100
            self.gradient[~self.mask] = torch.nan

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.h, self.embedding, self.bias

    def run(self, backend: str) -> tuple[Tensor, ...]:
        losses = linear_cross_entropy(
            self.h, self.embedding, self.targets, self.bias, mask=self.mask, kernel_backend=backend
        )
        return (losses.detach(), *torch.autograd.grad(losses, self.leaves(), self.gradient))

    def exact(self) -> tuple[Tensor, ...]:
        leaves = [t.detach().double().requires_grad_() for t in self.leaves()]
        losses = reference.linear_cross_entropy(
            leaves[0], leaves[1], self.targets, leaves[2], self.mask
        )
        return (losses.detach(), *torch.autograd.grad(losses, leaves, self.upstream().double()))

    def plain(self) -> tuple[Tensor, ...]:
        mask = torch.ones_like(self.targets, dtype=torch.bool) if self.mask is None else self.mask
        losses = plain_losses(self.h, self.embedding, self.bias, self.targets, mask)
        gradients = torch.autograd.grad(losses, self.leaves(), self.upstream().to(losses.dtype))
        return (losses.detach(), *gradients)

    def upstream(self) -> Tensor:
        return self.gradient if self.mask is None else self.gradient.where(self.mask, 0.0)


def plain_losses(h: Tensor, e: Tensor, b: Tensor | None, targets: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(h[mask], e, b), targets[mask], reduction="none")
    return torch.zeros(len(h), dtype=losses.dtype, device=h.device).masked_scatter(mask, losses)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "v", "d", "masked"),
    [(1, 1, 1, False), (1, 50, 32, False), (65, 63, 17, True), (131, 257, 65, True)],
    ids=str,
)
def test_losses_and_gradients_match_the_reference(
    backend: str, device: torch.device, n: int, v: int, d: int, masked: bool, dtype: torch.dtype
):
    case = Case(n, v, d, dtype, device, masked)
    actual, exact, plain = case.run(backend), case.exact(), case.plain()
    assert actual[0].dtype == torch.float32
    assert_matches(actual[0], exact[0], scale=max(1.0, float(exact[0].max())))
    for got, true, naive in zip(actual[1:], exact[1:], plain[1:], strict=True):
        assert got.dtype == dtype
        # With one word every gradient is 0, and h or E is the size of a rounding error.
        assert_matches(got, true, naive, scale=None if v > 1 else 1.0)


def test_more_channels_than_one_tile_of_them(backend: str, device: torch.device):
    case = Case(40, 70, 300, torch.float32, device)
    for got, true in zip(case.run(backend), case.exact(), strict=True):
        assert_matches(got, true, scale=max(1.0, float(true.abs().max())))


def test_loss_of_one_word_is_zero(backend: str, device: torch.device):
    case = Case(9, 1, 5, torch.float32, device, masked=False)
    losses, *gradients = case.run(backend)
    assert losses.eq(0).all()
    for gradient in gradients:
        assert_matches(gradient, torch.zeros_like(gradient), scale=1.0)


def test_uniform_logits_cost_log_v(backend: str, device: torch.device):
    v = 149
    h = torch.randn(20, 8, device=device, requires_grad=True)
    targets = torch.arange(20, device=device)
    losses = linear_cross_entropy(h, torch.zeros(v, 8, device=device), targets,
                                  kernel_backend=backend)  # fmt: skip
    assert_matches(losses.detach(), torch.full_like(losses, math.log(v)))
    bias = torch.zeros(v, device=device, requires_grad=True)
    table = torch.zeros(v, 8, device=device)
    losses = linear_cross_entropy(h, table, targets, bias, kernel_backend=backend)
    (db,) = torch.autograd.grad(losses.sum(), bias)
    expected = torch.full_like(db, 20 / v)
    expected[:20] -= 1
    assert_matches(db, expected)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_common_shift_of_the_logits_changes_nothing(
    backend: str, device: torch.device, shift: float
):
    # Whole numbers: even the shifted logits are exact, so only lost digits of the sum would show.
    random = torch.Generator().manual_seed(3)
    h = torch.randint(-2, 3, (30, 6), generator=random).float().to(device).requires_grad_()
    e = torch.randint(-2, 3, (90, 6), generator=random).float().to(device)
    targets = torch.randint(0, 90, (30,), generator=random).to(device)
    results = []
    for bias in (torch.zeros(90, device=device), torch.full((90,), shift, device=device)):
        losses = linear_cross_entropy(h, e, targets, bias, kernel_backend=backend)
        results.append((losses.detach(), *torch.autograd.grad(losses.sum(), h)))
    for plain, shifted in zip(*results, strict=True):
        assert_matches(shifted, plain)


def test_large_logits_of_both_signs_stay_finite(backend: str, device: torch.device):
    h = torch.tensor([[100.0], [-100.0]], device=device, requires_grad=True)
    e = torch.linspace(-100, 100, 130, device=device)[:, None]
    targets = torch.tensor([129, 129], device=device)
    losses = linear_cross_entropy(h, e, targets, kernel_backend=backend)
    (dh,) = torch.autograd.grad(losses.sum(), h)
    assert losses.tolist() == [0.0, pytest.approx(20000, rel=1e-6)]
    assert dh.flatten().tolist() == [0.0, pytest.approx(-200, rel=1e-6)]


def test_words_ruled_out_by_an_infinite_bias(backend: str, device: torch.device):
    case = Case(12, 150, 6, torch.float32, device, masked=False)
    allowed = torch.arange(150, device=device) >= 100
    bias = torch.where(allowed, 0.0, -torch.inf)
    targets = case.targets % 50 + 100
    losses = linear_cross_entropy(case.h, case.embedding, targets, bias, kernel_backend=backend)
    gradients = torch.autograd.grad(losses.sum(), (case.h, case.embedding))
    subset = reference.linear_cross_entropy(case.h, case.embedding[100:], targets - 100)
    expected = torch.autograd.grad(subset.sum(), (case.h, case.embedding))
    assert_matches(losses.detach(), subset.detach(), scale=max(1.0, subset.max().item()))
    for got, true in zip(gradients, expected, strict=True):
        assert_matches(got, true)


def test_agrees_with_cross_entropy(backend: str, device: torch.device):
    case = Case(33, 77, 12, torch.float32, device)
    for got, plain in zip(case.run(backend), case.plain(), strict=True):
        torch.testing.assert_close(got, plain, rtol=2e-5, atol=2e-5)


def test_reference_has_the_right_gradients():
    case = Case(5, 7, 3, torch.float32, torch.device("cpu"))
    leaves = [t.detach().double().requires_grad_() for t in case.leaves()]

    def function(h: Tensor, e: Tensor, b: Tensor) -> Tensor:
        return reference.linear_cross_entropy(h, e, case.targets, b, case.mask)

    assert torch.autograd.gradcheck(function, leaves)


def test_gradients_are_those_of_finite_differences(backend: str, device: torch.device):
    # Independent of autograd: the loss itself, moved along one direction.
    case = Case(24, 90, 8, torch.float32, device)
    _, *gradients = case.run(backend)
    for leaf, gradient in zip(case.leaves(), gradients, strict=True):
        direction = torch.randn_like(leaf).detach()
        step, sums = 1e-2, []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.add_(sign * step * direction)
                losses = linear_cross_entropy(
                    *(case.h, case.embedding, case.targets, case.bias),
                    mask=case.mask, kernel_backend=backend)  # fmt: skip
                sums.append(float((losses.double() * case.upstream()).sum()))
                leaf.sub_(sign * step * direction)
        slope = float((gradient * direction).sum())
        assert (sums[0] - sums[1]) / (2 * step) == pytest.approx(slope, rel=2e-3, abs=2e-3)


def test_any_subset_of_gradients(backend: str, device: torch.device):
    case = Case(20, 66, 9, torch.float32, device)
    full = case.run(backend)
    for wanted in ([0], [1], [2], [0, 1], [1, 2]):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(case.leaves())]
        losses = linear_cross_entropy(leaves[0], leaves[1], case.targets, leaves[2],
                                      mask=case.mask, kernel_backend=backend)  # fmt: skip
        found = torch.autograd.grad(losses, [leaves[i] for i in wanted], case.gradient)
        assert torch.equal(losses, full[0])
        assert all(torch.equal(g, full[1 + i]) for g, i in zip(found, wanted, strict=True))


def test_second_derivatives_are_right_or_refused(
    backend: str, request: pytest.FixtureRequest, device: torch.device
):
    case = Case(20, 66, 9, torch.float32, device)
    losses = linear_cross_entropy(case.h, case.embedding, case.targets, case.bias,
                                  mask=case.mask, kernel_backend=backend)  # fmt: skip
    variant = request.node.callspec.params["backend"]
    if variant != "torch" or device.type != "cpu":
        with pytest.raises(UsageError, match=r"differentiated again.*create_graph"):
            torch.autograd.grad(losses.sum(), case.h, create_graph=True)
        return
    exact = reference.linear_cross_entropy(case.h, case.embedding, case.targets, case.bias,
                                           mask=case.mask)  # fmt: skip
    found, expected = (
        torch.autograd.grad(
            torch.autograd.grad(total.sum(), case.h, create_graph=True)[0].square().sum(),
            case.embedding,
        )[0]
        for total in (losses, exact)
    )
    assert_matches(found, expected)


def test_no_gradients_asked_for(backend: str, device: torch.device):
    case = Case(20, 66, 9, torch.float32, device)
    with torch.no_grad():
        losses = linear_cross_entropy(case.h, case.embedding, case.targets, case.bias,
                                      mask=case.mask, kernel_backend=backend)  # fmt: skip
    assert not losses.requires_grad
    assert torch.equal(losses, case.run(backend)[0])


def test_tiny_gradients_survive_16_bits(device: torch.device, backend: str):
    # 1 / (batch x length) times a small weight is below what fp16 holds.
    case = Case(30, 80, 16, torch.float16, device, masked=False)
    leaf = case.embedding.detach().float().requires_grad_()
    losses = linear_cross_entropy(case.h, leaf.half(), case.targets, kernel_backend=backend)
    large = torch.autograd.grad(losses.sum(), leaf)[0]
    h = case.h.detach().requires_grad_()
    losses = linear_cross_entropy(h, case.embedding, case.targets, kernel_backend=backend)
    small = torch.autograd.grad((losses * 2.0**-18).sum(), case.embedding)[0]
    # Half of fp16's smallest step is all that may be lost.
    torch.testing.assert_close(small.float() * 2.0**18, large, rtol=2.0**-10, atol=1.1 * 2.0**-7)


def test_two_runs_give_the_same_bits(backend: str, device: torch.device):
    case = Case(130, 300, 24, torch.float32, device)
    first, second = case.run(backend), case.run(backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_mask_that_selects_nothing(backend: str, device: torch.device):
    case = Case(17, 40, 6, torch.float32, device)
    case.mask = torch.zeros(17, device=device)
    assert all(result.eq(0).all() for result in case.run(backend))


def test_a_mask_that_selects_everything_is_no_mask(backend: str, device: torch.device):
    case = Case(17, 40, 6, torch.float32, device, masked=False)
    without = case.run(backend)
    case.mask = torch.full((17,), -3, device=device)
    for got, true in zip(case.run(backend), without, strict=True):
        assert torch.equal(got, true)


def test_empty_batch(backend: str, device: torch.device):
    case = Case(0, 40, 6, torch.float32, device, masked=False)
    losses, dh, de, db = case.run(backend)
    assert losses.shape == (0,)
    assert dh.shape == (0, 6)
    assert de.eq(0).all()
    assert db.eq(0).all()


def test_strided_views_and_leading_shape(backend: str, device: torch.device):
    random = torch.Generator().manual_seed(0)
    h = torch.randn(3, 22, 4, generator=random).to(device)[:, ::2].transpose(0, 1)
    e = torch.randn(8, 60, generator=random).to(device).T[::2, ::2]
    b = torch.randn(60, generator=random).to(device)[::2]
    targets = torch.randint(0, 30, (3, 11), generator=random).to(device).T
    mask = (torch.rand(3, 11, generator=random) < 0.5).to(device).T
    views = [t.requires_grad_() for t in (h, e, b)]
    losses = linear_cross_entropy(views[0], views[1], targets, views[2], mask=mask,
                                  kernel_backend=backend)  # fmt: skip
    assert losses.shape == (11, 3)
    exact = reference.linear_cross_entropy(h, e, targets, b, mask)
    assert_matches(losses.detach(), exact.detach(), scale=max(1.0, exact.max().item()))
    weights = torch.randn(11, 3, generator=random).to(device)
    found = torch.autograd.grad((losses * weights).sum(), views)
    expected = torch.autograd.grad((exact * weights).sum(), views)
    for got, true in zip(found, expected, strict=True):
        assert_matches(got, true)


def test_one_vector_and_its_target(backend: str, device: torch.device):
    h, e = torch.randn(6, device=device), torch.randn(9, 6, device=device)
    loss = linear_cross_entropy(h, e, torch.tensor(4, device=device), kernel_backend=backend)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(float(F.cross_entropy(e @ h, torch.tensor(4).to(device))),
                                        rel=1e-5)  # fmt: skip


def test_the_wider_of_two_dtypes_is_used(backend: str, device: torch.device):
    case = Case(20, 50, 8, torch.bfloat16, device)
    table = case.embedding.detach().float().requires_grad_()
    losses = linear_cross_entropy(case.h, table, case.targets, case.bias, mask=case.mask,
                                  kernel_backend=backend)  # fmt: skip
    dh, de = torch.autograd.grad(losses, (case.h, table), case.gradient)
    assert (dh.dtype, de.dtype) == (torch.bfloat16, torch.float32)
    assert_matches(de, case.exact()[2])


def test_autocast_leaves_fp32_inputs_in_fp32(backend: str, device: torch.device):
    case = Case(30, 60, 16, torch.float32, device)
    expected = case.run(backend)
    with torch.autocast(device.type, torch.bfloat16):
        actual = case.run(backend)
    for got, true in zip(actual, expected, strict=True):
        assert_matches(got, true)


def test_a_forced_backend_reaches_the_backward_pass(device: torch.device):
    case = Case(10, 30, 4, torch.float32, device)
    expected = case.run("torch")
    with dispatch.force_backend("torch", "linear_cross_entropy"):
        losses = linear_cross_entropy(case.h, case.embedding, case.targets, case.bias,
                                      mask=case.mask)  # fmt: skip
    found = torch.autograd.grad(losses, case.leaves(), case.gradient)
    assert all(torch.equal(a, e) for a, e in zip(found, expected[1:], strict=True))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_compiles_to_one_graph(device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "PLAIN_LOGITS", 0)
    if name == "triton":
        needs_triton(device)
    case = Case(24, 40, 8, torch.float32, device)

    def losses(h: Tensor, e: Tensor, b: Tensor) -> Tensor:
        found = linear_cross_entropy(h, e, case.targets, b, mask=case.mask, kernel_backend=name)
        return found * 2

    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    found, expected = compiled(*case.leaves()), losses(*case.leaves())
    assert_matches(found.detach(), expected.detach())
    for a, b in zip(torch.autograd.grad(found, case.leaves(), case.gradient),
                    torch.autograd.grad(expected, case.leaves(), case.gradient),
                    strict=True):  # fmt: skip
        assert_matches(a, b)


class Allocations(TorchDispatchMode):
    """Sizes in bytes of the storages that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                # Kept alive, so that an address is not given out twice.
                if all(storage.data_ptr() != old.data_ptr() for old in self._seen):
                    self._seen.append(storage)
                    self.sizes.append(storage.nbytes())
        return result


def test_the_torch_backend_holds_a_tile_of_logits():
    n, v, d = 4096, 2048, 8
    case = Case(n, v, d, torch.float32, torch.device("cpu"))
    h, e, b = (t.detach() for t in case.leaves())
    with Allocations() as allocations:
        forward = tiles.forward(h, e, b, case.targets, case.mask, True)
        tiles.backward(case.upstream(), h, e, b, case.targets, case.mask, *forward[1:],
                               True, True, True)  # fmt: skip
    assert max(allocations.sizes) <= 4 * tiles._TILE_LOGITS
    assert 4 * n * v >= 4 * tiles._TILE_LOGITS * 16


@pytest.fixture
def launches_left_out(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Any:
    needs_triton(device)
    from dlmone_fast.kernels.linear_cross_entropy import triton as kernels

    class Nothing:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **options: None

    for name in ("forward", "merge", "h_gradient", "table_gradient"):
        monkeypatch.setattr(kernels, f"_{name}_kernel", Nothing())
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    return kernels


def test_the_triton_backend_allocates_a_fraction_of_the_logits(launches_left_out: Any):
    # At full size: the host side is what allocates, and it runs without the kernels.
    kernels, (n, v, d) = launches_left_out, (8192, 30522, 128)
    h, e = torch.zeros(n, d), torch.zeros(v, d)
    b, targets, gradient = torch.zeros(v), torch.zeros(n, dtype=torch.int64), torch.zeros(n)
    selected = torch.ones(n, dtype=torch.bool)
    with Allocations() as forward:
        _, statistics, rows = kernels.forward(h, e, b, targets, selected, True)
    with Allocations() as backward:
        kernels.backward(gradient, h, e, b, targets, selected, statistics, rows, True, True, True)
    of_h, of_e = kernels._splits(n // 32, v, 64)[0], kernels._splits(v // 64, n, 32)[0]
    of_z = kernels._splits(n // 64, v, 64)[0]
    # Losses, statistics, partials and the order of the rows with its sort.
    assert sum(forward.sizes) <= n * (4 + 8 + 8 * of_z + 4) + 32 * n
    results = 4 * (n * d + v * d + v)
    workspace = 4 * d * (of_h * n + of_e * v) + 4 * of_e * v + 16 * n
    assert sum(backward.sizes) <= workspace + results
    assert 14 * (sum(forward.sizes) + sum(backward.sizes)) <= 4 * n * v


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(2, 3)}, r"h must have shape \[\.\.\., 4\].*\(2, 3\)"),
        ({"h": torch.zeros(())}, "h must have shape"),
        ({"h": torch.zeros(2, 4).double()}, "h must be float32"),
        ({"embedding": torch.zeros(0, 4)}, "embedding must have shape"),
        ({"embedding": torch.zeros(4)}, "embedding must have shape"),
        ({"embedding": torch.zeros(5, 4).long()}, "embedding must be float32"),
        ({"embedding": torch.zeros(5, 4, device="meta")}, "embedding on meta.*one device"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(5,\)"),
        ({"bias": torch.zeros(5).double()}, "bias must be float32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets must have shape \(2,\)"),
        ({"targets": torch.zeros(2)}, "targets must be int64"),
        ({"mask": torch.zeros(2, 1)}, r"mask must have shape \(2,\)"),
        ({"targets": torch.tensor([0, 5])}, r"targets must lie in \[0, 5\).*found 5"),
        ({"targets": torch.tensor([-1, 0])}, r"found -1; leave such positions out with mask="),
    ],
)
def test_refusals_name_the_argument(change: dict[str, Tensor], message: str):
    arguments: dict[str, Any] = {
        "h": torch.zeros(2, 4),
        "embedding": torch.zeros(5, 4),
        "targets": torch.zeros(2, dtype=torch.int64),
        "bias": torch.zeros(5),
    }
    with pytest.raises(UsageError, match=message):
        linear_cross_entropy(**{**arguments, **change})


def test_forcing_triton_where_it_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(support, "interpreting", lambda: False)
    h, e, targets = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
    assert linear_cross_entropy(h, e, targets).shape == (2,)
    with pytest.raises(BackendUnavailableError, match=r"triton.*Available here: torch"):
        linear_cross_entropy(h, e, targets, kernel_backend="triton")
