from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlmone_fast.errors import BackendUnavailableError, UsageError
from dlmone_fast.kernels import dispatch, native
from dlmone_fast.kernels.forward_diffusion import (
    diffuse_of_draws,
    forward_diffusion,
    forward_diffusion_of_tokens,
    reference,
)
from dlmone_fast.kernels.forward_diffusion.native import forward_diffusion as _cpp
from dlmone_fast.kernels.forward_diffusion.op import _to_table
from dlmone_fast.kernels.noise import Stream, draws_of, normal
from dlmone_fast.kernels.noise import reference as noise_reference
from tests.kernels.tolerances import assert_matches

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 1), (2, 5, 7), (2, 33, 31), (1, 9, 128), (1, 3, 130)]
# An interpreted program takes a tenth of a second: 16 bits differ in loads and stores only.
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [((2, 5, 7), dtype) for dtype in DTYPES[1:]]
STREAM = Stream.GENERATOR_NOISE
SEED = 2**63 + 11


@pytest.fixture(params=["torch", "cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that runs here."""
    if request.param == "cpp" and not native.is_available():
        pytest.skip(f"native: {native.why_missing()}")
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def place(backend: str, device: torch.device) -> torch.device:
    """Where the backend runs."""
    return torch.device("cpu") if backend == "cpp" else device


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Case:
    """Seeded arguments of one shape: tensors on the CPU, rounded to `dtype`."""

    def __init__(self, rows: int, length: int, channels: int, dtype: torch.dtype = DTYPES[0]):
        numbers = generator(rows + length + channels)
        self.table = torch.randn(11, channels, generator=numbers).to(dtype)
        self.ids = torch.randint(0, 11, (rows, length), generator=numbers)
        self.x0 = torch.randn(rows, length, channels, generator=numbers).to(dtype)
        self.alpha = torch.rand(rows, generator=numbers)
        self.sigma = torch.rand(rows, generator=numbers)
        self.mask = torch.randint(0, 2, (rows, length), generator=numbers)
        self.grad = torch.randn(rows, length, channels, generator=numbers).to(dtype)
        self.samples = [7 * i + 1 for i in range(rows)]
        self.draw = (SEED, STREAM, self.samples, 4)

    def noise(self) -> Tensor:
        _, length, channels = self.x0.shape
        draws = draws_of(SEED, self.samples, 4, torch.device("cpu"))
        return noise_reference.normal(draws, STREAM, length, channels)

    def exact(self, x0: Tensor, mask: Tensor | None) -> Tensor:
        return reference.forward_diffusion(
            x0.double(), self.alpha.double(), self.sigma.double(), mask, self.noise()
        )

    def of_x0(self, place: torch.device, mask: Tensor | None, **request: Any) -> Tensor:
        x0, alpha, sigma = (t.to(place) for t in (self.x0, self.alpha, self.sigma))
        there = None if mask is None else mask.to(place)
        return forward_diffusion(x0, alpha, sigma, there, *self.draw, **request)

    def of_tokens(self, place: torch.device, mask: Tensor | None, **request: Any) -> Tensor:
        ids, table = self.ids.to(place), self.table.to(place)
        there = None if mask is None else mask.to(place)
        return forward_diffusion_of_tokens(
            ids, table, self.alpha.to(place), self.sigma.to(place), there, *self.draw, **request
        )


def skip_unless_it_computes(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpp" and dtype != torch.float32:
        pytest.skip("the native backend computes in float32")


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_x_t_is_the_reference(backend, place, shape: tuple[int, int, int], dtype: torch.dtype):
    skip_unless_it_computes(backend, dtype)
    case = Case(*shape, dtype)
    # With and without a mask, from vectors and from ids.
    for mask in (case.mask, None) if dtype == torch.float32 else (case.mask,):
        x_t = case.of_x0(place, mask, kernel_backend=backend)
        assert x_t.dtype == dtype
        assert_matches(x_t.cpu(), case.exact(case.x0, mask))
    x_t = case.of_tokens(place, case.mask, kernel_backend=backend)
    assert_matches(x_t.cpu(), case.exact(case.table[case.ids], case.mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_reference(backend, place, dtype: torch.dtype):
    skip_unless_it_computes(backend, dtype)
    case = Case(2, 9, 31, dtype)
    for mask in (case.mask, None) if dtype == torch.float32 else (case.mask,):
        case.x0 = case.x0.detach().requires_grad_()
        case.of_x0(place, mask, kernel_backend=backend).backward(case.grad.to(place))
        leaf = case.x0.detach().double().requires_grad_()
        case.exact(leaf, mask).backward(case.grad.double())
        assert_matches(case.x0.grad, leaf.grad)

        case.table = case.table.detach().requires_grad_()
        case.of_tokens(place, mask, kernel_backend=backend).backward(case.grad.to(place))
        leaf = case.table.detach().double().requires_grad_()
        case.exact(leaf[case.ids], mask).backward(case.grad.double())
        # 16-bit tables: the sums are made in fp32 and rounded once.
        assert_matches(case.table.grad, leaf.grad)


def test_the_reference_formula_has_the_gradients_of_finite_differences():
    case = Case(2, 3, 2)
    alpha, sigma, noise = case.alpha.double(), case.sigma.double(), case.noise()

    def from_table(table: Tensor) -> Tensor:
        return reference.forward_diffusion(table[case.ids], alpha, sigma, case.mask, noise)

    assert torch.autograd.gradcheck(from_table, case.table.double().requires_grad_())


def test_source_positions_are_copied_to_the_bit(backend, place):
    for dtype in DTYPES if backend != "cpp" else DTYPES[:1]:
        case = Case(2, 9, 24, dtype)
        x_t = case.of_x0(place, case.mask, kernel_backend=backend).cpu()
        source = case.mask == 0
        assert torch.equal(x_t[source], case.x0[source])
        assert not torch.equal(x_t[~source], case.x0[~source])


def test_the_noise_is_that_of_normal(backend, place):
    case = Case(2, 6, 20)
    zeros, ones = torch.zeros(2, device=place), torch.ones(2, device=place)
    x_t = forward_diffusion(
        case.x0.to(place), zeros, ones, None, *case.draw, kernel_backend=backend
    )
    expected = normal(*case.draw, 6, 20, device=place, kernel_backend=backend)
    assert torch.equal(x_t, expected)
    kept = forward_diffusion(
        case.x0.to(place), ones, zeros, None, *case.draw, kernel_backend=backend
    )
    assert torch.equal(kept.cpu(), case.x0)


def test_masks_of_any_dtype_and_masks_that_select_nothing_or_everything(backend, place):
    case = Case(1, 9, 8)
    expected = case.of_x0(place, case.mask, kernel_backend=backend)
    for mask in (case.mask.bool(), case.mask * 0.5, -2 * case.mask):
        assert torch.equal(case.of_x0(place, mask, kernel_backend=backend), expected)
    none = case.of_x0(place, torch.zeros(1, 9), kernel_backend=backend)
    assert torch.equal(none.cpu(), case.x0)
    everything = case.of_x0(place, torch.ones(1, 9), kernel_backend=backend)
    assert torch.equal(everything, case.of_x0(place, None, kernel_backend=backend))


def test_strided_views_and_narrow_ids(backend, place):
    case = Case(2, 6, 10)
    expected = case.of_x0(place, case.mask, kernel_backend=backend)
    from_ids = case.of_tokens(place, case.mask, kernel_backend=backend)
    case.x0 = case.x0.transpose(1, 2).contiguous().transpose(1, 2)
    case.table = case.table.T.contiguous().T
    case.mask = case.mask.bool().T.contiguous().T
    case.ids = case.ids.int().T.contiguous().T
    case.alpha = torch.stack([case.alpha, case.alpha], dim=1)[:, 1]
    assert torch.equal(case.of_x0(place, case.mask, kernel_backend=backend), expected)
    assert torch.equal(case.of_tokens(place, case.mask, kernel_backend=backend), from_ids)


def test_empty_batches_and_empty_rows(backend, place):
    for shape in ((0, 3, 4), (2, 0, 4)):
        case = Case(*shape)
        case.x0.requires_grad_()
        case.table.requires_grad_()
        x_t = case.of_x0(place, case.mask, kernel_backend=backend)
        from_ids = case.of_tokens(place, case.mask, kernel_backend=backend)
        assert x_t.shape == from_ids.shape == shape
        (x_t.sum() + from_ids.sum()).backward()
        assert case.x0.grad.shape == shape
        assert torch.equal(case.table.grad, torch.zeros_like(case.table))
    empty = torch.zeros(0, device=place)
    x0 = torch.zeros(0, 3, 4, device=place)
    assert (
        forward_diffusion(x0, empty, empty, None, 0, 0, 5, 0, kernel_backend=backend).numel() == 0
    )


def test_a_row_does_not_depend_on_its_companions(backend, place):
    case = Case(3, 9, 36)
    batch = case.of_x0(place, case.mask, kernel_backend=backend)
    row = slice(1, 2)
    alone = forward_diffusion(
        case.x0[row].to(place), case.alpha[row].to(place), case.sigma[row].to(place),
        case.mask[row].to(place), SEED, STREAM, case.samples[1], 4, kernel_backend=backend,
    )  # fmt: skip
    assert torch.equal(alone[0], batch[1])


def test_two_runs_give_the_same_bits(backend, place):
    results = []
    for _ in range(2):
        case = Case(2, 9, 12)
        case.table.requires_grad_()
        x_t = case.of_tokens(place, case.mask, kernel_backend=backend)
        x_t.backward(case.grad.to(place))
        results.append((x_t.detach(), case.table.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("path", ["avx512", "avx2", "portable"])
def test_instruction_sets_and_threads_give_the_same_bits(path: str):
    if path not in native.cpu_paths():
        pytest.skip(f"no native path {path} here: {native.why_missing() or 'other CPU'}")
    case = Case(5, 150, 33)
    draws = draws_of(SEED, case.samples, 4, torch.device("cpu"))
    arguments = (case.table, case.ids, case.alpha, case.sigma, case.mask.bool(), draws, STREAM)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = _cpp(*arguments, path)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, _cpp(*arguments, "portable"))
    assert_matches(found, case.exact(case.table[case.ids], case.mask))


@pytest.mark.parametrize("form", ["of_x0", "of_tokens"])
def test_it_can_be_compiled_without_a_graph_break(backend, place, form: str):
    def run(case: Case) -> tuple[Tensor, Tensor]:
        leaf = case.x0 if form == "of_x0" else case.table
        leaf.requires_grad_()
        # Sample indices as a tensor, as a training step has them.
        case.draw = (SEED, STREAM, torch.tensor(case.samples, device=place), 4)
        x_t = getattr(case, form)(place, case.mask, kernel_backend=backend)
        (x_t * case.grad.to(place)).sum().backward()
        return x_t.detach(), leaf.grad

    expected = run(Case(1, 5, 6))
    case = Case(1, 5, 6)
    leaf = (case.x0 if form == "of_x0" else case.table).requires_grad_()
    samples = torch.tensor(case.samples, device=place)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(leaf: Tensor, ids: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        factors = (case.alpha.to(place), case.sigma.to(place), case.mask.to(place))
        draw = (SEED, STREAM, samples, 4)
        if form == "of_x0":
            x_t = forward_diffusion(leaf.to(place), *factors, *draw, kernel_backend=backend)
        else:
            x_t = forward_diffusion_of_tokens(
                ids, leaf.to(place), *factors, *draw, kernel_backend=backend
            )
        return x_t, (x_t * case.grad.to(place)).sum()

    x_t, total = loss(leaf, case.ids.to(place), samples)
    total.backward()
    assert torch.equal(x_t.detach(), expected[0])
    assert torch.equal(leaf.grad, expected[1])


def test_the_backend_that_was_asked_for_reaches_the_backward_pass(monkeypatch: pytest.MonkeyPatch):
    used = []
    monkeypatch.setattr(
        dispatch, "select", spy(used, dispatch.select), raising=True
    )  # the ops look it up there
    case = Case(1, 2, 3)
    case.x0.requires_grad_()
    with dispatch.force_backend("torch", op="forward_diffusion"):
        x_t = case.of_x0(torch.device("cpu"), None)
    x_t.sum().backward()
    assert {op: name for op, name in used if op.startswith("forward_diffusion")} == {
        "forward_diffusion": "torch",
        "forward_diffusion_backward": "torch",
    }


def spy(used: list, select: Any) -> Any:
    def recorded(op: str, *tensors: Any, kernel_backend: str | None = None) -> Any:
        backend = select(op, *tensors, kernel_backend=kernel_backend)
        used.append((op, backend.name))
        return backend

    return recorded


def arguments(**change: Any) -> dict[str, Any]:
    plain = {
        "x0": torch.zeros(2, 3, 4),
        "alpha": torch.ones(2),
        "sigma": torch.ones(2),
        "mask": torch.ones(2, 3),
        "seed": 0,
        "stream": 0,
        "sample": [0, 1],
        "step": 0,
    }
    return {**plain, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(2, 3)}, r"x0 must have shape \[B, L, d\].*got \(2, 3\)"),
        ({"x0": torch.zeros(2, 3, 0)}, "d >= 1"),
        ({"x0": torch.zeros(2, 3, 4).double()}, "x0 must be float32, float16 or bfloat16"),
        ({"alpha": torch.ones(3)}, r"alpha must be float32 \[2\].*got torch.float32 \(3,\)"),
        ({"sigma": torch.ones(2).double()}, r"sigma must be float32 \[2\].*float64"),
        ({"sigma": torch.ones(2, device="meta")}, "sigma is on meta and the data on cpu"),
        ({"alpha": torch.ones(2, requires_grad=True)}, r"alpha gets no gradient.*alpha.detach"),
        ({"mask": torch.ones(2, 4)}, r"mask must be real \[2, 3\].*got torch.float32 \(2, 4\)"),
        ({"mask": torch.ones(2, 3, dtype=torch.complex64)}, "mask must be real"),
        ({"stream": -1}, r"stream must lie in \[0, 2\^32\)"),
        ({"seed": -1}, "seed must lie in"),
        ({"sample": 5}, r"name 1 row\(s\) of noise for 2 row\(s\) of data"),
        ({"sample": [1, 2, 3]}, r"name 3 row\(s\) of noise for 2"),
    ],
)
def test_refusals_name_the_argument(change: dict, message: str):
    with pytest.raises(UsageError, match=message):
        forward_diffusion(**arguments(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": torch.zeros(4)}, r"embedding must have shape \[V, d\]"),
        ({"embedding": torch.zeros(9, 4).long()}, "embedding must be float32"),
        ({"ids": torch.zeros(2)}, r"ids must be integers \[B, L\], got torch.float32 \(2,\)"),
        ({"ids": torch.zeros(2, 3).bool()}, "ids must be integers"),
        ({"ids": torch.full((2, 3), 9)}, r"ids must lie in \[0, 9\).*from 9 to 9"),
        ({"ids": torch.full((2, 3), -1)}, r"ids must lie in \[0, 9\).*from -1 to -1"),
        ({"ids": torch.zeros(2, 3, device="meta").long()}, "ids is on meta"),
    ],
)
def test_refusals_of_the_gather_form(change: dict, message: str):
    given = arguments(ids=torch.zeros(2, 3).long(), embedding=torch.zeros(9, 4))
    del given["x0"]
    with pytest.raises(UsageError, match=message):
        forward_diffusion_of_tokens(**{**given, **change})


@pytest.mark.parametrize("wrong", [9, 30, -1])
def test_compiled_graphs_check_ids_where_they_run(backend, place, wrong: int):
    if place.type != "cpu":
        pytest.skip("ids on a GPU are not read back")
    # An id outside of the table would read memory of others, or wrap around.
    given = arguments(ids=torch.zeros(2, 3).long(), embedding=torch.zeros(9, 4))
    del given["x0"], given["ids"]

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(ids: Tensor) -> Tensor:
        return forward_diffusion_of_tokens(ids, **given, kernel_backend=backend)

    compiled(torch.full((2, 3), 8))
    with pytest.raises(UsageError, match=rf"ids must lie in \[0, 9\).*from {wrong} to {wrong}"):
        compiled(torch.full((2, 3), wrong))


def test_expanded_factors_and_draws(backend, place):
    case = Case(2, 3, 8)
    case.alpha = torch.full((2,), 0.5)
    results = []
    for alpha in (case.alpha, torch.tensor(0.5).expand(2)):
        leaf = case.x0.to(place).detach().requires_grad_()
        x_t = forward_diffusion(
            leaf, alpha.to(place), alpha.to(place), None, *case.draw, kernel_backend=backend
        )
        x_t.backward(case.grad.to(place))
        results.append((x_t.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    draws = draws_of(SEED, 3, 4, place).expand(2, 4)
    found = [
        diffuse_of_draws(
            leaf.detach(), None, alpha.to(place), alpha.to(place), None, each, STREAM,
            kernel_backend=backend,
        )
        for each in (draws, draws.contiguous())
    ]  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (torch.zeros(1, 4).long(), r"draws must be int64 \[2, 4\].*got torch.int64 \(1, 4\)"),
        (torch.zeros(2, 4), "draws must be int64"),
        (torch.zeros(2, 4, device="meta").long(), "draws is on meta"),
    ],
)
def test_draws_that_do_not_fit_are_refused(draws: Tensor, message: str):
    with pytest.raises(UsageError, match=message):
        diffuse_of_draws(torch.zeros(2, 3, 4), None, torch.ones(2), torch.ones(2), None, draws, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_narrow_ids_with_draws(backend, place, dtype: torch.dtype):
    case, ones = Case(2, 5, 8), torch.ones(2, device=place)
    draws = draws_of(SEED, case.samples, 4, place)
    found = [
        diffuse_of_draws(
            case.table.to(place), ids.to(place), ones, ones, None, draws, STREAM,
            kernel_backend=backend,
        )
        for ids in (case.ids, case.ids.to(dtype))
    ]  # fmt: skip
    assert torch.equal(*found)


def test_the_stream_of_draws_is_checked():
    ones, draws = torch.ones(2), torch.zeros(2, 4).long()
    with pytest.raises(UsageError, match="stream must lie in"):
        diffuse_of_draws(torch.zeros(2, 3, 4), None, ones, ones, None, draws, -1)


def test_gradients_of_ids_nobody_checked_stay_inside_the_table():
    # On a GPU ids are not read back.
    ids = torch.tensor([[-7, 0, 2, 50]])
    ones = torch.ones(1, 4, 2)
    found = _to_table(ones, ids, torch.ones(1), None, 3, "torch")
    assert torch.equal(found, torch.tensor([[2.0, 2.0], [0.0, 0.0], [2.0, 2.0]]))


def test_a_backend_that_cannot_compute_a_dtype_is_refused_by_name_and_passed_over_by_auto():
    half = arguments(x0=torch.zeros(2, 3, 4).half())
    assert forward_diffusion(**half).dtype == torch.float16
    with pytest.raises(BackendUnavailableError, match=r"computes in float32, not in torch.float16"):
        forward_diffusion(**half, kernel_backend="cpp")


@pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(2, 3, 5)}, r"x0 must be \[2, 3, 4\], got \[2, 3, 5\]"),
        ({"x0": torch.zeros(2, 4, 3).transpose(1, 2)}, "x0 must be contiguous"),
        ({"x0": torch.zeros(2, 3, 4).bfloat16()}, "x0 must be float32"),
        ({"x0": torch.zeros(7, 4)}, r"x0 must have 3 dimension\(s\), got 2"),
        ({"ids": torch.zeros(2, 3).long()}, r"x0 must have 2 dimension\(s\), got 3"),
        ({"alpha": torch.zeros(3)}, r"alpha must be \[2\], got \[3\]"),
        ({"alpha": torch.zeros(1).expand(2)}, "alpha must be contiguous"),
        ({"sigma": torch.zeros(2).double()}, "sigma must be float32"),
        ({"sigma": None}, "sigma must be a tensor"),
        ({"mask": torch.zeros(2, 4).bool()}, r"mask must be \[2, 3\], got \[2, 4\]"),
        ({"mask": torch.zeros(2, 3)}, "mask must be bool or uint8"),
        ({"draws": torch.zeros(3, 4).long()}, r"out must be \[3, 3, 4\], got \[2, 3, 4\]"),
        ({"out": None}, "out must be a tensor"),
        ({"threads": 0}, "threads must lie in"),
    ],
)
def test_the_native_side_refuses_what_it_cannot_diffuse(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        native.module().forward_diffusion(**{**native_arguments(), **change})


@pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")
@pytest.mark.parametrize("wrong", [-1, 7, 2**62, -(2**63)])
def test_the_native_side_refuses_ids_outside_the_table(wrong: int):
    ids = torch.full((2, 3), 6)
    given = {**native_arguments(), "x0": torch.zeros(7, 4), "ids": ids}
    native.module().forward_diffusion(**given)
    ids[1, 2] = wrong
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 7\), the rows of x0"):
        native.module().forward_diffusion(**given)
    # Of positions that stay as they are, too: they are copied.
    given["mask"] = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="ids must lie in"):
        native.module().forward_diffusion(**given)


@pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")
@pytest.mark.parametrize("name", ["draws", "x0", "ids", "alpha", "sigma", "mask"])
def test_the_native_side_refuses_an_output_that_lies_in_an_input(name: str):
    given = {**native_arguments(), "x0": torch.zeros(7, 4), "ids": torch.zeros(2, 3).long()}
    given["mask"] = torch.ones(2, 3, dtype=torch.bool)
    memory = torch.zeros(64)
    like = given[name]
    view = memory.view(like.dtype)[: like.numel()].view(like.shape)
    given |= {name: view, "out": memory[:24].view(2, 3, 4)}
    with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
        native.module().forward_diffusion(**given)


def native_arguments() -> dict:
    factors = {name: torch.ones(2) for name in ("alpha", "sigma")}
    draws, shape = torch.zeros(2, 4, dtype=torch.int64), (2, 3, 4)
    tensors = {"draws": draws, "x0": torch.zeros(shape), "out": torch.empty(shape), **factors}
    return {**tensors, "ids": None, "mask": None, "stream": 0, "threads": 1}
