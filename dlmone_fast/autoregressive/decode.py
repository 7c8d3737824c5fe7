"""Generation with a key-value cache: greedy, beam search, and sampling.

B = rows of a batch, V = target vocabulary. What is drawn for a row depends on its seed, its
candidate's number and its position, never on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlmone_fast.autoregressive.model import EncoderDecoder
from dlmone_fast.kernels.noise import Stream, random_bits

_NEVER = -math.inf
# Rows that have ended are taken out of a batch when they are this share of it.
_ENDED_SHARE = 0.2


@dataclass(frozen=True)
class Marks:
    """Ids of a vocabulary that decoding knows."""

    start_id: int
    end_id: int
    never: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """Settings of one token's draw.

    Scores are divided by `temperature`; of the `top_k` most likely tokens (0: all) the fewest that
    have `top_p` of the probability are drawn from.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Written:
    """The generated tokens of a row."""

    ids: list[int]
    """Without marks."""
    score: float
    """Sum of the tokens' log probabilities, the end mark's included, at temperature 1."""
    ended: bool = True
    """False for a text that was cut at the most tokens."""


@torch.inference_mode()
def decode_one_by_one(
    model: EncoderDecoder,
    source: Tensor,
    padded: Tensor | None,
    marks: Marks,
    most: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] = (),
    candidates: Sequence[int] = (),
) -> list[Written]:
    """One text a row: the most likely token at each position, or one that is drawn.

    Args:
        source: int64 [B, S]; `padded` bool [B, S] or None.
        most: tokens of a text; one that has not ended by then is cut.
        sampling: None: greedy.
        seeds: of each row, and `candidates` its number among the texts of one source.
    """
    rows = torch.arange(len(source))
    state = model.start(source, padded, most)
    token = torch.full((len(source),), marks.start_id)
    ended = torch.zeros(len(source), dtype=torch.bool)
    ids = torch.full((len(source), most), marks.start_id)
    scores = torch.zeros(len(source), dtype=torch.float64)
    number = torch.tensor(list(candidates))
    for position in range(most):
        logits = _allowed(model.step(token, position, state), marks)
        if sampling is None:
            token = logits.argmax(-1)
        else:
            live = rows.tolist()
            words = random_bits(
                [seeds[i] for i in live], Stream.GENERATION, number[rows], position, 0
            )
            token = _drawn(logits, words, sampling)
        log_p = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        token = torch.where(ended, marks.end_id, token)
        scores[rows] += torch.where(ended, 0.0, log_p).double()
        ids[rows, position] = token
        ended = ended | (token == marks.end_id)
        if bool(ended.all()):
            break
        if float(ended.float().mean()) >= _ENDED_SHARE:
            (going,) = torch.nonzero(~ended, as_tuple=True)
            state, rows = state.select(going), rows[going]
            token, ended = token[going], ended[going]
    return [
        Written(_until(row, marks.end_id), score, marks.end_id in row)
        for row, score in zip(ids.tolist(), scores.tolist(), strict=True)
    ]


@torch.inference_mode()
def decode_beams(
    model: EncoderDecoder,
    source: Tensor,
    padded: Tensor | None,
    marks: Marks,
    most: int,
    beams: int,
    length_penalty: float = 1.0,
) -> list[list[Written]]:
    """The best texts of each row by beam search, `beams` of them, best first.

    Texts are ranked by the sum of their log probabilities over their length, end mark included,
    to the power of `length_penalty`. A row ends when as many texts have ended as there are beams
    and none that goes on scores better now.
    """
    batch = len(source)
    search = _Beams(batch, beams, most, marks, length_penalty)
    state = model.start(source, padded, most)
    state = state.select(torch.arange(batch).repeat_interleave(beams))
    token = torch.full((batch * beams,), marks.start_id)
    for position in range(most):
        log_p = _allowed(model.step(token, position, state), marks).log_softmax(-1)
        parents, token = search.advance(log_p, position)
        if search.done():
            break
        state = state.select(parents)
    return search.best()


class _Beams:
    """Beams of each row: those that go on, and the best that have ended."""

    def __init__(self, batch: int, beams: int, most: int, marks: Marks, penalty: float) -> None:
        self.batch, self.beams, self.most = batch, beams, most
        self.marks, self.penalty = marks, penalty
        self.sums = torch.full((batch, beams), _NEVER)
        # All beams begin alike: only the first of them counts.
        self.sums[:, 0] = 0.0
        self.ids = torch.zeros(batch, beams, 0, dtype=torch.int64)
        self.ended: list[list[tuple[float, Written]]] = [[] for _ in range(batch)]
        self.finished = [False] * batch

    def advance(self, log_p: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Take the next tokens' log probabilities [B·beams, V]; parents and tokens [B·beams]."""
        size = log_p.shape[-1]
        sums = self.sums[:, :, None] + log_p.view(self.batch, self.beams, size)
        wanted = min(2 * self.beams, self.beams * size)
        best, at = sums.flatten(1).topk(wanted, dim=-1)
        parent, token = at // size, at % size
        ends = token == self.marks.end_id
        self._collect(best, parent, ends, position)
        going = best.masked_fill(ends, _NEVER)
        self.sums, order = going.topk(self.beams, dim=-1)
        parent, token = parent.gather(1, order), token.gather(1, order)
        kept = self.ids.gather(1, parent[:, :, None].expand(-1, -1, position))
        self.ids = torch.cat([kept, token[:, :, None]], -1)
        first = torch.arange(self.batch)[:, None] * self.beams
        self._close(position)
        return (first + parent).flatten(), token.flatten()

    def done(self) -> bool:
        return all(self.finished)

    def best(self) -> list[list[Written]]:
        """The ended texts, and where there are too few those that were cut."""
        results = []
        for row, ended in enumerate(self.ended):
            texts = sorted(ended, key=lambda item: -item[0])
            for beam in range(self.beams):
                if len(texts) >= self.beams:
                    break
                total = float(self.sums[row, beam])
                if total > _NEVER:
                    ids = self.ids[row, beam].tolist()
                    texts.append((self._score(total, len(ids)), Written(ids, total, ended=False)))
            results.append([written for _, written in texts[: self.beams]])
        return results

    def _collect(self, best: Tensor, parent: Tensor, ends: Tensor, position: int) -> None:
        for row, place in torch.nonzero(ends).tolist():
            total = float(best[row, place])
            # What ends beyond the places of the beams would not have gone on either.
            if self.finished[row] or place >= self.beams or total == _NEVER:
                continue
            ids = self.ids[row, parent[row, place]].tolist()
            self.ended[row].append((self._score(total, position + 1), Written(ids, total)))

    def _close(self, position: int) -> None:
        for row, ended in enumerate(self.ended):
            if self.finished[row] or len(ended) < self.beams:
                continue
            ended.sort(key=lambda item: -item[0])
            del ended[self.beams :]
            going = self._score(float(self.sums[row, 0]), position + 1)
            self.finished[row] = ended[-1][0] >= going

    def _score(self, total: float, length: int) -> float:
        return total / max(1, length) ** self.penalty


def _allowed(logits: Tensor, marks: Marks) -> Tensor:
    logits[:, list(marks.never)] = _NEVER
    return logits


def _drawn(logits: Tensor, words: Tensor, sampling: Sampling) -> Tensor:
    """Tokens [B] at the uniform numbers of random 32-bit words [B]."""
    kept = sampling.top_k if 0 < sampling.top_k < logits.shape[-1] else logits.shape[-1]
    values, ids = logits.topk(kept, dim=-1)
    p = (values / sampling.temperature).softmax(-1, dtype=torch.float64)
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= sampling.top_p, 0.0)
    reached = p.cumsum(-1)
    u = (words.double() + 0.5) / (1 << 32) * reached[:, -1]
    place = (reached <= u[:, None]).sum(-1, keepdim=True).clamp_(max=kept - 1)
    return ids.gather(1, place)[:, 0]


def _until(ids: list[int], end_id: int) -> list[int]:
    return ids[: ids.index(end_id)] if end_id in ids else ids
