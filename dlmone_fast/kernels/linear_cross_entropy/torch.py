"""Linear cross-entropy in torch, on any device: tiles of logits that stay in a cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dlmone_fast.errors import UsageError

# A tile of logits in the torch backend, tokens x words: 2 MB, about a core's second-level cache.
# Of the shapes from 128 to 2048 tokens and 256 to 2048 words it measured fastest, on 1 CPU core.
_TILE_TOKENS = 1024
_TILE_LOGITS = 1 << 19

# By the number of logits, positions x words, the torch backend
# * up to the first number computes the plain formula: its few calls are all that takes time,
# * up to the second keeps exp(z - m) for the backward pass (4 MB), which a cache still holds,
# * beyond makes every tile again.
PLAIN_LOGITS = 1 << 18
_KEPT_LOGITS = 1 << 20

# Finite, so that a tile of words that are all ruled out (bias -inf) adds 0 and not NaN.
_LOWEST = torch.finfo(torch.float32).min


def forward(
    h: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    selected: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows_of(selected)
    x, y = take(h, rows).float(), take(targets, rows)
    check_targets(y, len(embedding))
    keep = keep and len(x) * len(embedding) <= _KEPT_LOGITS
    kept = x.new_empty((len(x), len(embedding)) if keep else 0)
    if keep:
        m, s, target = _keeping(x, embedding.float(), bias, y, kept)
    else:
        m, s, target = _online(x, embedding, bias, y)
    # The difference first: logits may be much larger than the loss.
    found = (m - target).add_(s.log())
    if rows is None:
        return found, torch.stack((m, s)), kept
    losses = found.new_zeros(len(h)).index_copy_(0, rows, found)
    padding = (0, len(h) - len(x))
    return losses, F.pad(torch.stack((m, s)), padding), kept


def backward(
    gradient: Tensor,
    h: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    selected: Tensor | None,
    statistics: Tensor,
    kept: Tensor,
    want_h: bool,
    want_embedding: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows = rows_of(selected)
    x, y = take(h, rows).float(), take(targets, rows)
    m, s = statistics[:, : len(x)]
    # Tiles hold s (p - [v = y]), so that a pass over vectors of V numbers is saved.
    weight = take(gradient, rows) / s
    weighted = x * weight[:, None]
    if kept.numel():
        dx = kept @ embedding.float() if want_h else None
        de = kept.T @ weighted if want_embedding else None
        db = kept.T @ weight if want_bias else None
    else:
        # Contiguous, as the fake kernels promise, whatever the strides of x and the table.
        dx = x.new_zeros(x.shape) if want_h else None
        de = x.new_zeros(embedding.shape) if want_embedding else None
        db = x.new_zeros(len(embedding)) if want_bias else None
        _again(x, embedding, bias, y, m, s, weighted, weight, dx, de, db)
    if dx is not None:
        dx = dx.mul_(weight[:, None]).to(h.dtype)
        if rows is not None:
            dx = h.new_zeros(h.shape).index_copy_(0, rows, dx)
    return dx, de, db


def rows_of(selected: Tensor | None) -> Tensor | None:
    return None if selected is None else selected.nonzero().squeeze(1)


def take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _keeping(
    x: Tensor, embedding: Tensor, bias: Tensor | None, targets: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(m, s = sum exp(z - m), target logit); z becomes s (p - [v = y])."""
    _logits(x, embedding, bias, z)
    m = z.amax(1)
    place = targets[:, None]
    target = z.gather(1, place)[:, 0]
    s = z.sub_(m[:, None]).exp_().sum(1)
    _subtract(z, place, s)
    return m, s, target


def _online(
    x: Tensor, embedding: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(m, s = sum exp(z - m), target logit), the maximum and the sum kept up to date by tile."""
    m, s, target = x.new_full((len(x),), _LOWEST), x.new_zeros(len(x)), x.new_zeros(len(x))
    tile_words, storage = _tile(len(x), embedding)
    for first in range(0, len(embedding), tile_words):
        words = embedding[first : first + tile_words].float()
        part = None if bias is None else bias[first : first + tile_words]
        for rows in _token_tiles(len(x)):
            z = _logits(x[rows], words, part, _shaped(storage, x[rows], words))
            place, inside = _place(targets[rows], first, len(words))
            target[rows] = torch.where(inside, z.gather(1, place[:, None])[:, 0], target[rows])
            highest = torch.maximum(m[rows], z.amax(1))
            total = z.sub_(highest[:, None]).exp_().sum(1)
            s[rows] = s[rows] * (m[rows] - highest).exp() + total
            m[rows] = highest
    return m, s, target


def _again(
    x: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    m: Tensor,
    s: Tensor,
    weighted: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    de: Tensor | None,
    db: Tensor | None,
) -> None:
    """Adds the gradients to dx (not yet times the weight), de and db, making every tile again."""
    tile_words, storage = _tile(len(x), embedding)
    for first in range(0, len(embedding), tile_words):
        part = slice(first, first + tile_words)
        words = embedding[part].float()
        de_part, db_part = (None if total is None else total[part] for total in (de, db))
        for rows in _token_tiles(len(x)):
            z = _shaped(storage, x[rows], words)
            # The product is added to b - m in place: no further pass to subtract m.
            offset = 0.0 if bias is None else bias[None, part].float()
            torch.sub(offset, m[rows, None].expand_as(z), out=z)
            z.addmm_(x[rows], words.T).exp_()
            place, inside = _place(targets[rows], first, len(words))
            _subtract(z, place[:, None], s[rows] * inside)
            # The weights multiply vectors of d numbers, not of V.
            if dx is not None:
                dx[rows].addmm_(z, words)
            if de_part is not None:
                de_part.addmm_(z.T, weighted[rows])
            if db_part is not None:
                db_part.addmv_(z.T, weight[rows])


def _subtract(z: Tensor, place: Tensor, values: Tensor) -> None:
    z.scatter_(1, place, z.gather(1, place).sub_(values[:, None]))


def _logits(x: Tensor, words: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, words.T, out=out)
    return torch.addmm(bias.float(), x, words.T, out=out)


def _place(targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Columns of the targets in a tile of words, clamped, and whether they lie in it."""
    place = targets - first
    return place.clamp(0, count - 1), (place >= 0) & (place < count)


def _token_tiles(n: int) -> list[slice]:
    return [slice(first, first + _TILE_TOKENS) for first in range(0, n, _TILE_TOKENS)]


def _tile(n: int, embedding: Tensor) -> tuple[int, Tensor]:
    tokens = max(1, min(n, _TILE_TOKENS))
    words = min(len(embedding), max(1, _TILE_LOGITS // tokens))
    return words, torch.empty(tokens * words, dtype=torch.float32, device=embedding.device)


def _shaped(storage: Tensor, x: Tensor, words: Tensor) -> Tensor:
    return storage[: len(x) * len(words)].view(len(x), len(words))


def plain(
    h: Tensor, embedding: Tensor, bias: Tensor | None, targets: Tensor, selected: Tensor | None
) -> Tensor:
    rows = rows_of(selected)
    x, y = take(h, rows).float(), take(targets, rows)
    check_targets(y, len(embedding))
    z = F.linear(x, embedding.float(), None if bias is None else bias.float())
    losses = F.cross_entropy(z, y, reduction="none")
    if rows is None:
        return losses
    return losses.new_zeros(len(h)).index_copy(0, rows, losses)


def check_targets(selected_targets: Tensor, v: int) -> None:
    # Reading a value makes the host wait for a GPU: checked on CPUs alone.
    if selected_targets.device.type != "cpu" or not selected_targets.numel():
        return
    low, high = (int(extreme) for extreme in selected_targets.aminmax())
    if low < 0 or high >= v:
        raise UsageError(
            f"linear_cross_entropy: targets must lie in [0, {v}) at selected positions, "
            f"found {low if low < 0 else high}; leave such positions out with mask="
        )
