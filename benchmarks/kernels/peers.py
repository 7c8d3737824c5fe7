"""Other implementations of the operations, to time beside this package's own.

Every function here returns `{name: call}` on inputs that are bound already. A third-party
package appears where it can be imported. torch.compile compiles at the first call, before
anything is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.race import COMPILED, EAGER
from benchmarks.harness.timing import Call
from benchmarks.kernels import targets

# All differences of 128 tokens and BERT's vocabulary are 2 GB.
_MOST_TOKENS_FOR_ALL_DIFFERENCES = 128
_MOST_SCORES = 1 << 32


def eager_and_compiled(function: Callable[..., Any], *arguments: Any) -> dict[str, Call]:
    """A formula in plain PyTorch, as written and compiled."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    return {
        EAGER: lambda: function(*arguments),
        COMPILED: lambda: compiled(*arguments),
    }


def rounding(x: Tensor, table: Tensor) -> dict[str, Call]:
    """Nearest rows of `table` [V, d] for x [N, d], both fp32."""
    norms = table.square().sum(1)
    peers: dict[str, Call] = {}
    if x.shape[0] * table.shape[0] <= _MOST_SCORES:
        compiled = torch.compile(expression_argmin, fullgraph=True, dynamic=False)
        peers[targets.MATMUL_ARGMIN] = lambda: matmul_argmin(x, table, norms)
        peers[targets.COMPILED_ARGMIN] = lambda: compiled(x, table, norms)
        peers[targets.EXPANDED_SQUARE] = lambda: expanded_square(x, table)
        if x.is_cuda:
            small = (x.bfloat16(), table.bfloat16(), norms)
            peers[targets.COMPILED_ARGMIN_BF16] = lambda: compiled(*small)
    if len(x) <= _MOST_TOKENS_FOR_ALL_DIFFERENCES:
        peers[targets.ALL_DIFFERENCES] = lambda: all_differences(x, table)
    return {**peers, **_flash_kmeans(x, table), **_faiss(x, table)}


def matmul_argmin(x: Tensor, table: Tensor, norms: Tensor) -> Tensor:
    """|E|² - 2 x Eᵀ and its lowest place, norms computed beforehand; scores [N, V] in memory."""
    return torch.addmm(norms, x, table.T, alpha=-2).argmin(1)


def expression_argmin(x: Tensor, table: Tensor, norms: Tensor) -> Tensor:
    """`matmul_argmin` as one expression, which torch.compile fuses with the search."""
    return (norms - 2 * (x @ table.T)).argmin(1)


def all_differences(x: Tensor, table: Tensor) -> Tensor:
    """DiffuSeq's `get_knn` with dist="l2": every difference [V, N, d], norms, the best six."""
    distances = (table[:, None] - x[None]).norm(dim=-1)
    return distances.topk(min(6, len(table)), dim=0, largest=False).indices[0]


def expanded_square(x: Tensor, table: Tensor) -> Tensor:
    """DiffuSeq's `get_efficient_knn`: distances [V, N] by the expanded square, the best one."""
    norms = table.square().sum(1, keepdim=True) + x.square().sum(1)
    distances = (norms - 2 * (table @ x.T)).clamp(min=0)
    return distances.topk(1, dim=0, largest=False).indices[0]


def _flash_kmeans(x: Tensor, table: Tensor) -> dict[str, Call]:
    if not x.is_cuda or not _importable("flash_kmeans"):
        return {}
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    points, centres = x.bfloat16()[None], table.bfloat16()[None]
    sizes = (x.square().sum(1)[None], table.square().sum(1)[None])

    def assign() -> Tensor:
        return euclid_assign_triton(points, centres, sizes[0], c_sq=sizes[1])[0].long()

    return {targets.FLASH_KMEANS: assign}


def _faiss(x: Tensor, table: Tensor) -> dict[str, Call]:
    if x.is_cuda or not _importable("faiss"):
        return {}
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(table.shape[1])
    index.add(table.numpy())
    return {"faiss IndexFlatL2": lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])}


def forward_diffusion(x0: Tensor, alpha: Tensor, sigma: Tensor, mask: Tensor) -> Tensor:
    """x_t = alpha x_0 + sigma ε where the mask is not 0, with torch's own noise."""
    noise = torch.randn_like(x0)
    x_t = alpha[:, None, None].to(x0.dtype) * x0 + sigma[:, None, None].to(x0.dtype) * noise
    return torch.where(mask[..., None] != 0, x_t, x0)


def forward_diffusion_of_tokens(
    ids: Tensor, table: Tensor, alpha: Tensor, sigma: Tensor, mask: Tensor
) -> Tensor:
    """`forward_diffusion` from token ids, the embeddings gathered first."""
    return forward_diffusion(F.embedding(ids, table), alpha, sigma, mask)


def distillation_loss(
    x: Tensor, x0_teacher: Tensor, x0_score: Tensor, mask: Tensor, mu: float, floor: float
) -> Tensor:
    """The SiD loss [B] as one writes it, in fp32."""
    x, x0_teacher, x0_score = (t.float() for t in (x, x0_teacher, x0_score))
    target = (mask != 0)[..., None]
    count = target.sum((1, 2)).clamp(min=1) * x.shape[-1]
    distance = ((x - x0_teacher).abs() * target).sum((1, 2)) / count
    weight = distance.clamp(min=floor).detach()
    a, r = x0_teacher - x0_score, x0_score - x
    return (((1 - mu) * a * a + a * r) * target).sum((1, 2)) / count / weight


def linear_cross_entropy(h: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Losses [N] from logits [N, V] in memory."""
    return F.cross_entropy((h @ table.T).float(), targets, reduction="none")


def fused_linear_cross_entropies() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Third-party losses without logits in memory (GPU): functions of (h, table, targets)."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    if not torch.cuda.is_available():
        return found
    if _importable("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut cross-entropy"] = lambda h, e, y: cut(h, e, y, reduction="none")
    if _importable("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        # It reduces: its sum is what the others' sum is.
        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger"] = lambda h, e, y: liger(e, h, y)
    return found


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of a sum over the last dimension."""
    return F.layer_norm(x + residual, x.shape[-1:], weight, bias, eps)


def input_layer_norm(
    projected: Tensor, position: Tensor, time: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm of projection + position [L, H] + time step [B, H]."""
    total = projected + position + time[:, None]
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU (by erf) of x + bias."""
    return F.gelu(x + bias)


def bias_tanh(x: Tensor, bias: Tensor) -> Tensor:
    """tanh of x + bias."""
    return torch.tanh(x + bias)


def _importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
