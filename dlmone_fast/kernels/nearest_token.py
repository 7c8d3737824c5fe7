"""Nearest-token rounding: the vocabulary row closest to each vector in the L2 norm.

DiffuSeq (arXiv 2210.08933) rounds x_0 to tokens this way; DLM-One (arXiv 2506.00290) decodes its
one-step samples with it. Every backend returns the ids of the fp64 answer: an fp32 search finds
the ids whose score could be the lowest given its rounding error, and where there are several
the fp64 distances decide (`reference.squared_distances`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels import dispatch, native
from dlmone_fast.kernels.reference import squared_distances

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

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


def nearest_token(x: Tensor, embedding: Tensor, *, kernel_backend: str | None = None) -> Tensor:
    """ids = argmin_v |x - E_v|^2, without ever holding tokens x vocabulary numbers on CPUs.

    Args:
        x: [..., d] in fp32, fp16 or bf16, any strides.
        embedding: E [V, d] in fp32, fp16 or bf16, any strides, on the device of x.
        kernel_backend: "cpp", "torch", "auto"; default as `dispatch` says.

    Returns:
        int64 [...]: the ids by fp64 distance, the lowest id among equals. A distance that is
        not finite never wins; id 0 where no distance is finite.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    ids: Tensor = _run("nearest_token", x, embedding, kernel_backend)
    return ids.view(x.shape[:-1])


def nearest_token_with_margin(
    x: Tensor, embedding: Tensor, *, kernel_backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The ids of `nearest_token`, and how clear each choice was.

    Arguments and errors as for `nearest_token`.

    Returns:
        ids: int64 [...].
        margin: fp32 [...], the second-lowest squared distance minus the lowest, both in fp64: 0
            for equals and where no distance is finite, infinite where only one is.
    """
    ids, margin = _run("nearest_token_with_margin", x, embedding, kernel_backend)
    return ids.view(x.shape[:-1]), margin.view(x.shape[:-1])


def _run(op: str, x: Tensor, embedding: Tensor, kernel_backend: str | None) -> Any:
    _check(x, embedding)
    backend = dispatch.select(op, x, embedding, kernel_backend=kernel_backend)
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    with torch.no_grad():
        return backend.run(rows, embedding.detach().float())


def _check(x: Tensor, embedding: Tensor) -> None:
    if embedding.dim() != 2 or 0 in embedding.shape:
        raise UsageError(
            "nearest_token: embedding must have shape [V, d] with V, d >= 1, "
            f"got {tuple(embedding.shape)}"
        )
    if x.dim() < 1 or x.shape[-1] != embedding.shape[1]:
        raise UsageError(
            f"nearest_token: x must have shape [..., {embedding.shape[1]}] to match embedding "
            f"{tuple(embedding.shape)}, got {tuple(x.shape)}"
        )
    for name, tensor in (("x", x), ("embedding", embedding)):
        if tensor.dtype not in _DTYPES:
            raise UsageError(
                f"nearest_token: {name} must be float32, float16 or bfloat16, got {tensor.dtype}; "
                "convert it with .float()"
            )
    if x.device != embedding.device:
        raise UsageError(
            f"nearest_token: x is on {x.device} and embedding on {embedding.device}; "
            "move them to one device"
        )


def _cpp_usable(x: Tensor, embedding: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"it runs on CPU tensors, not on {x.device.type}"
    return native.why_missing()


def _cpp(x: Tensor, embedding: Tensor, path: str = "") -> Tensor:
    ids = torch.empty(len(x), dtype=torch.int64)
    _call_native(x, embedding, path, ids, 0)
    return ids


def _cpp_with_margin(x: Tensor, embedding: Tensor, path: str = "") -> tuple[Tensor, Tensor]:
    ids = torch.empty(len(x), dtype=torch.int64)
    margin = torch.empty(len(x), dtype=torch.float32)
    _call_native(x, embedding, path, ids, margin.data_ptr())
    return ids, margin


def _call_native(x: Tensor, embedding: Tensor, path: str, ids: Tensor, margins: int) -> None:
    x, embedding = _unit_stride(x), _unit_stride(embedding)
    native.module().nearest_token(
        x=x.data_ptr(),
        n=len(x),
        x_stride=x.stride(0),
        embedding=embedding.data_ptr(),
        v=len(embedding),
        e_stride=embedding.stride(0),
        d=x.shape[1],
        ids=ids.data_ptr(),
        threads=torch.get_num_threads(),
        path=path,
        margins=margins,
    )


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _torch(x: Tensor, embedding: Tensor) -> Tensor:
    # fp32 scores, fp64 for near ties only: on CPUs an fp64 product takes twice the time and an
    # fp64 copy of the table, on many GPUs 64 times; and it would still leave ties to chance.
    half_norms = embedding.square().sum(-1).mul_(0.5)
    ids = torch.empty(len(x), dtype=torch.int64, device=x.device)
    rows_per_pass = max(1, _SCORES_PER_PASS // len(embedding))
    for first in range(0, len(x), rows_per_pass):
        part = x[first : first + rows_per_pass]
        ids[first : first + rows_per_pass] = _search(part, embedding, half_norms)
    return ids


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


def _torch_with_margin(x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    half_norms = embedding.square().sum(-1).mul_(0.5)
    ids = torch.empty(len(x), dtype=torch.int64, device=x.device)
    margin = torch.empty(len(x), dtype=torch.float32, device=x.device)
    per_row = max(len(embedding), 2 * embedding.shape[1])
    rows_per_pass = max(1, _SCORES_PER_PASS // per_row)
    for first in range(0, len(x), rows_per_pass):
        part = slice(first, first + rows_per_pass)
        ids[part], margin[part] = _search_two(x[part], embedding, half_norms)
    return ids, margin


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
    Underflow adds less than the smallest normal number for every term.
    """
    d = x.shape[1]
    half = 1.01 * half_norms.max().double()
    size = x.double().norm(dim=1) * (2 * half).sqrt() + half
    relative = 1.01 * (d + 4) * 2.0**-24 / (1 - (d + 4) * 2.0**-24)
    relative += 2.1 * _operand_roundoff(x.device)
    error = (relative * size + (d + 4) * 2.0**-125).float() * (1 + 2.0**-22)
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


dispatch.register(
    "nearest_token",
    dispatch.Backend("cpp", _cpp_usable, _cpp),
    dispatch.Backend("torch", lambda x, embedding: None, _torch),
)
dispatch.register(
    "nearest_token_with_margin",
    dispatch.Backend("cpp", _cpp_usable, _cpp_with_margin),
    dispatch.Backend("torch", lambda x, embedding: None, _torch_with_margin),
)
