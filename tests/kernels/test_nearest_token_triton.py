"""The Triton backend: on a GPU where there is one, else in the interpreter, hence few tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlmone_fast.errors import BackendUnavailableError
from dlmone_fast.kernels import dispatch
from dlmone_fast.kernels.nearest_token import (
    Vocabulary,
    nearest_token,
    nearest_token_with_margin,
    reference,
)

pytest.importorskip("triton")

# The interpreter computes with numpy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids_of(x: Tensor, e: Tensor | Vocabulary, device: torch.device) -> Tensor:
    table = e.to(device)
    return nearest_token(x.to(device), table, kernel_backend="triton").cpu()


def margins_of(x: Tensor, e: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    ids, margin = nearest_token_with_margin(x.to(device), e.to(device), kernel_backend="triton")
    return ids.cpu(), margin.cpu()


def near(e: Tensor, n: int, noise: float = 0.1) -> Tensor:
    """Tokens that lie clearly closest to one row: decided without a second look."""
    rows = torch.randint(len(e), (n,), generator=torch.Generator().manual_seed(7))
    return e[rows].float() + noise * random(n, e.shape[1], seed=8)


@pytest.mark.parametrize(
    ("n", "v", "d"),
    [(1, 1, 1), (3, 2, 3), (2, 127, 8), (5, 128, 16), (70, 129, 17), (4, 1021, 100), (3, 300, 200)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ids_are_the_fp64_answer(n: int, v: int, d: int, dtype: torch.dtype, device: torch.device):
    e = random(v, d, seed=1).to(dtype)
    x = near(e, n).to(dtype)
    assert torch.equal(ids_of(x, e, device), reference.nearest_token(x, e))


@pytest.mark.parametrize(
    ("x_dtype", "e_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16),
     (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
)  # fmt: skip
def test_unclear_tokens_of_mixed_dtypes(
    x_dtype: torch.dtype, e_dtype: torch.dtype, device: torch.device
):
    # Far from every row, and the rounding of the operands leaves several within reach.
    x, e = (3 * random(4, 24)).to(x_dtype), random(400, 24, seed=1).to(e_dtype)
    assert torch.equal(ids_of(x, e, device), reference.nearest_token(x, e))


def test_a_large_vocabulary(device: torch.device):
    v = 250_001 if device.type == "cuda" else 16_001
    e = random(v, 8)
    e[v - 1] = 9.0
    x = torch.cat([e[[3, v // 2, v - 2, v - 1]] + 1e-4, random(1, 8, seed=1)])
    assert torch.equal(ids_of(x, e, device), reference.nearest_token(x, e))


def test_leading_shape_and_strided_views(device: torch.device):
    e = random(300, 40)[::3, 5:17]
    x = random(4, 2, 24)[:, 1, ::2].reshape(2, 2, 12)
    assert torch.equal(ids_of(x, e, device), reference.nearest_token(x, e))
    transposed = random(12, 100).T
    rows = random(12, 3).T
    assert torch.equal(ids_of(rows, transposed, device), reference.nearest_token(rows, transposed))
    assert ids_of(random(0, 12), e, device).shape == (0,)
    assert ids_of(random(4, 0, 12), e, device).shape == (4, 0)
    assert ids_of(random(12), e, device).shape == ()


def test_lowest_id_wins_among_duplicate_rows(device: torch.device):
    e = random(40, 19).repeat(8, 1)
    x = e[[319, 200, 41]] + 0.01 * random(3, 19, seed=2)
    assert ids_of(x, e, device).tolist() == [39, 0, 1]


def test_opposite_rows_tie_at_the_origin(device: torch.device):
    e = torch.tensor([[3.0, 0.0], [0.0, -1.0], [0.0, 1.0], [-1.0, 0.0]])
    assert ids_of(torch.zeros(1, 2), e, device).tolist() == [1]


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_near_ties_that_fp32_cannot_order(scale: float, device: torch.device):
    centres = 4 + random(4, 64)
    e = centres.repeat(40, 1)
    ulps = torch.randint(-2, 3, e.shape, generator=torch.Generator().manual_seed(3))
    e = (e * (1 + ulps * 2.0**-23) * scale).contiguous()
    x = (centres + 0.02 * random(4, 64, seed=4)) * scale
    expected = reference.nearest_token(x, e)
    fp32 = torch.addmm(e.square().sum(1) / 2, x, e.T, alpha=-1).argmin(1)
    assert not torch.equal(fp32, expected), "the case is too easy to prove anything"
    assert torch.equal(ids_of(x, e, device), expected)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e18, 1e30])
def test_extreme_magnitudes(magnitude: float, device: torch.device):
    x, e = random(3, 10) * magnitude, random(150, 10, seed=1) * magnitude
    assert torch.equal(ids_of(x, e, device), reference.nearest_token(x, e))


def test_lowest_id_wins_where_fp64_sees_no_difference(device: torch.device):
    x, e = random(2, 10) * torch.tensor([[1e9], [1e13]]), random(200, 10, seed=1)
    assert torch.equal(ids_of(x, e, device), reference.nearest_token(x, e))


def test_fp16_rows_near_its_largest_number(device: torch.device):
    e = (6e4 * random(200, 6).sign() * (1 - 0.5 * random(200, 6, seed=1).abs().clamp(max=1))).half()
    x = (e[:3].float() * 0.99).half()
    assert torch.equal(ids_of(x, e, device), reference.nearest_token(x, e))


def test_non_finite_values_never_win(device: torch.device):
    e = random(150, 6)
    x = random(4, 6, seed=1)
    expected = reference.nearest_token(x, e[2:]) + 2
    e[0, 3], e[1, 2] = torch.nan, torch.inf
    assert torch.equal(ids_of(x, e, device), expected)
    x[2, 0], x[3, 1] = torch.nan, -torch.inf
    expected[2] = expected[3] = 0
    assert torch.equal(ids_of(x, e, device), expected)
    assert ids_of(x[:1], torch.full((3, 6), torch.nan), device).tolist() == [0]


@pytest.mark.parametrize(("n", "v", "d"), [(1, 2, 1), (3, 129, 31), (2, 700, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_margins_are_the_fp64_differences(
    n: int, v: int, d: int, dtype: torch.dtype, device: torch.device
):
    x, e = random(n, d).to(dtype), random(v, d, seed=1).to(dtype)
    ids, margin = margins_of(x, e, device)
    assert torch.equal(ids, reference.nearest_token(x, e))
    torch.testing.assert_close(margin.double(), reference.margin(x, e), rtol=1e-6, atol=0)


def test_margins_of_near_ties_and_duplicates(device: torch.device):
    centres = 4 + random(2, 64)
    e = centres.repeat(9, 1)
    e = e * (
        1 + torch.randint(-2, 3, e.shape, generator=torch.Generator().manual_seed(3)) * 2.0**-23
    )
    x = centres + 0.02 * random(2, 64, seed=4)
    ids, margin = margins_of(x, e, device)
    assert torch.equal(ids, reference.nearest_token(x, e))
    torch.testing.assert_close(margin.double(), reference.margin(x, e), rtol=1e-5, atol=1e-12)
    ids, margin = margins_of(x, e.repeat(2, 1), device)
    assert margin.eq(0).all()
    assert torch.equal(ids, reference.nearest_token(x, e))


def test_margin_without_a_second_or_a_first_distance(device: torch.device):
    x = random(2, 6)
    assert margins_of(x, random(1, 6, seed=1), device)[1].eq(torch.inf).all()
    table = random(90, 6, seed=1)
    x[1, 0] = torch.nan
    ids, margin = margins_of(x, table, device)
    assert ids[1] == 0
    assert margin[1] == 0
    table[:89] = torch.inf
    ids, margin = margins_of(x[:1], table, device)
    assert ids.tolist() == [89]
    assert margin.eq(torch.inf).all()


def test_a_vocabulary_keeps_its_search_table_until_it_changes(device: torch.device):
    e = random(200, 16).to(device)
    kept = Vocabulary(e)
    x = near(e.cpu(), 2)
    first = ids_of(x, kept, device)
    search = kept.prepared(("triton", torch.bfloat16), pytest.fail)
    assert search.rows.shape == (256, 16)
    assert torch.equal(first, reference.nearest_token(x, e.cpu()))
    e.copy_(e.flip(0))
    assert torch.equal(ids_of(x, kept, device), 199 - first)


def test_compiles_without_a_break(device: torch.device):
    e = random(60, 10).to(device)
    x = near(e.cpu(), 3).to(device)
    for table in (e, Vocabulary(e)):
        compiled = torch.compile(
            lambda x, table=table: nearest_token(x, table, kernel_backend="triton"),
            backend="aot_eager",
            fullgraph=True,
        )
        assert torch.equal(compiled(x), reference.nearest_token(x, e))


@pytest.mark.parametrize("v", [1, 2, 30_522, 250_000])
@pytest.mark.parametrize("n", [1, 64, 65, 128, 4096, 16_384])
def test_the_plan_covers_the_vocabulary_and_keeps_the_workspace_small(n: int, v: int):
    from dlmone_fast.kernels.nearest_token.triton import Plan

    plan = Plan.of(n, v, margin=False)
    assert plan.splits * plan.tiles_per_split >= plan.tiles
    assert (plan.splits - 1) * plan.tiles_per_split < plan.tiles
    assert plan.tiles * 128 >= v
    programs = -(-n // plan.tokens) * plan.splits
    assert programs >= min(132, plan.tiles)
    if v >= 30_522 and n >= 16_384:
        assert 12 * plan.splits * n <= 4 * v * n / 1000


def test_only_the_interpreter_runs_it_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with (
        dispatch.force_backend("triton"),
        pytest.raises(BackendUnavailableError, match="it runs on CUDA tensors"),
    ):
        nearest_token(random(2, 3), random(4, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_captures_it(device: torch.device):
    e, x = random(3000, 64).to(device), random(40, 64, seed=1).to(device)
    kept, static = Vocabulary(e), torch.zeros_like(x)
    nearest_token(static, kept, kernel_backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = nearest_token(static, kept, kernel_backend="triton")
    static.copy_(x)
    graph.replay()
    assert torch.equal(ids, reference.nearest_token(x, e))
