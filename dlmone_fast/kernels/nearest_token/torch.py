"""Nearest-token rounding in torch, on any device: an fp32 product decided in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from dlmone_fast.kernels.nearest_token.reference import squared_distances
from dlmone_fast.kernels.nearest_token.vocabulary import Vocabulary, contiguous_rows

# Scores in flight in the torch backend: 2^22 fp32 are 16 MB, about what a CPU's cache holds.
_SCORES_PER_PASS = 1 << 22
# Candidate pairs times channels measured at once in fp64: 2^22 are 32 MB.
_FP64_ELEMENTS_PER_PASS = 1 << 22

# What an operand can lose before the product under torch's fp32 precision settings.
_OPERAND_ROUNDOFF = {
    "none": 0.0,  # not set at this level
    "ieee": 0.0,
    "highest": 0.0,
    "tf32": 2.0**-10,
    "high": 2.0**-10,
}
_OPERAND_ROUNDOFF_LOWEST = 2.0**-7


def search(rows: Tensor, vocabulary: Vocabulary, with_margin: bool) -> tuple[Tensor, Tensor | None]:
    """ids [n], and margins [n] if wanted."""
    # fp32 scores, fp64 for near ties only: on CPUs an fp64 product takes twice the time and an
    # fp64 copy of the table, on many GPUs 64 times; and it would still leave ties to chance.
    x, table = rows.float(), vocabulary.prepared("fp32", contiguous_rows)
    half_norms = table.square().sum(-1).mul_(0.5)
    ids = torch.empty(len(x), dtype=torch.int64, device=x.device)
    margin = torch.empty(len(x), dtype=torch.float32, device=x.device) if with_margin else None
    # With margins two candidates of every row are measured in fp64.
    per_row = max(len(table), 2 * table.shape[1]) if with_margin else len(table)
    rows_per_pass = max(1, _SCORES_PER_PASS // per_row)
    for first in range(0, len(x), rows_per_pass):
        part = slice(first, first + rows_per_pass)
        if margin is None:
            ids[part] = _search(x[part], table, half_norms)
        else:
            ids[part], margin[part] = _search_two(x[part], table, half_norms)
    return ids, margin


def _search(x: Tensor, embedding: Tensor, half_norms: Tensor) -> Tensor:
    if len(embedding) == 1:
        return torch.zeros(len(x), dtype=torch.int64, device=x.device)
    scores = _scores(x, embedding, half_norms)
    lowest, ids = scores.topk(2, dim=1, largest=False)
    limit = lowest[:, 0] + 2 * _score_error(x, half_norms)
    # Written so that NaN counts as unclear.
    unclear = (~(lowest[:, 1] > limit)).nonzero().squeeze(-1)
    best = ids[:, 0]
    for row in unclear.tolist():
        # Beyond fp32's range the limit is not finite, and every id is measured.
        near = ~(scores[row] > limit[row])
        best[row] = _nearest_of(x[row], embedding, near.nonzero().squeeze(-1))
    return best


def _search_two(x: Tensor, embedding: Tensor, half_norms: Tensor) -> tuple[Tensor, Tensor]:
    # As `_search`, from the second-lowest score on: the third says whether two ids are enough.
    count = min(3, len(embedding))
    scores = _scores(x, embedding, half_norms)
    lowest, ids = scores.topk(count, dim=1, largest=False)
    second = min(2, count)
    limit = lowest[:, second - 1] + 2 * _score_error(x, half_norms)
    candidates = ids[:, :second].sort(dim=1).values
    distances = squared_distances(x[:, None], embedding[candidates])
    best, margin = _best_and_margin(candidates, distances)
    unclear = ~(lowest[:, 2] > limit) if count == 3 else ~limit.isfinite()
    for row in unclear.nonzero().squeeze(-1).tolist():
        near = (~(scores[row] > limit[row])).nonzero().squeeze(-1)
        found = _best_and_margin(near[None], _distances_to(x[row], embedding, near)[None])
        best[row], margin[row] = found[0][0], found[1][0]
    return best, margin


def _best_and_margin(candidates: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """From candidates [n, k] in rising order and their distances: ids [n] and margins [n]."""
    lowest = distances.min(dim=1, keepdim=True).values
    place = (distances == lowest).int().argmax(dim=1, keepdim=True)
    others = distances.scatter(1, place, torch.inf)
    margin = (others.min(dim=1).values - lowest.squeeze(1)).float()
    # Infinite less infinite: no distance is finite, and the choice of id 0 means nothing.
    return candidates.gather(1, place).squeeze(1), margin.nan_to_num(nan=0.0, posinf=torch.inf)


def _scores(x: Tensor, embedding: Tensor, half_norms: Tensor) -> Tensor:
    # Autocast would run the product in 16 bits, which the error bound does not cover.
    with torch.autocast(x.device.type, enabled=False):
        return torch.addmm(half_norms, x, embedding.T, alpha=-1)


def _nearest_of(x: Tensor, embedding: Tensor, candidates: Tensor) -> Tensor:
    # min and the first place that holds it: argmin alone promises no particular tie.
    distances = _distances_to(x, embedding, candidates)
    return candidates[(distances == distances.min()).nonzero()[0, 0]]


def _distances_to(x: Tensor, embedding: Tensor, candidates: Tensor) -> Tensor:
    per_pass = max(1, _FP64_ELEMENTS_PER_PASS // embedding.shape[1])
    parts = [squared_distances(x, embedding[ids]) for ids in candidates.split(per_pass)]
    return torch.cat(parts)


def _score_error(x: Tensor, half_norms: Tensor) -> Tensor:
    """Bound on |fp32 score - exact score| per row of x; infinite beyond fp32's range.

    (d + 4) roundings of relative size 2^-24, in any order, of terms whose sizes add up to at
    most |x| |e| + |e|^2 / 2, and the rounding of the operands themselves under TF32 or bf16.
    Underflow adds less than the smallest normal number for every term. The last part is what
    rounding adds to half a distance in fp64: where that makes rows equally far, the lowest id
    wins, and no score may say otherwise.
    """
    d = x.shape[1]
    half = 1.01 * half_norms.max().double()
    norm = x.double().norm(dim=1)
    size = norm * (2 * half).sqrt() + half
    relative = 1.01 * (d + 4) * 2.0**-24 / (1 - (d + 4) * 2.0**-24)
    relative += 2.1 * _operand_roundoff(x.device)
    error = relative * size + (d + 4) * 2.0**-125 + 2.0**-48 * (norm.square() + 2 * half)
    error = error.float() * (1 + 2.0**-22)
    return torch.where(size < 1e37, error, torch.inf)


def _operand_roundoff(device: torch.device) -> float:
    library = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    # Settings nest; the least precise one anywhere is a safe bound.
    holders = (torch.backends, library, library.matmul)
    settings = {getattr(holder, "fp32_precision", "none") for holder in holders}
    settings.add(_legacy_precision())
    return max(_OPERAND_ROUNDOFF.get(name, _OPERAND_ROUNDOFF_LOWEST) for name in settings)


def _legacy_precision() -> str:
    # torch raises when the old setting was mixed with the newer per-library ones.
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "medium"
