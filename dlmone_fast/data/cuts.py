"""Counts of the texts of a split that lose tokens, and the limits that would spare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlmone_fast.config import Config, ModelConfig
from dlmone_fast.config.room import SEPARATORS, largest_source
from dlmone_fast.data.batches import kept_lengths
from dlmone_fast.data.cache import TokenCache
from dlmone_fast.data.rows import read_rows
from dlmone_fast.text_tokenizer import TextTokenizer

IntArray = npt.NDArray[np.int64]

# A limit that is proposed cuts at most this share, and is a multiple of eight.
_SPARED, _MULTIPLE = 0.99, 8
_CHUNK_ROWS = 2048


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row of a split with [CLS] and [SEP], int64 [n] a side."""

    split: str
    src: IntArray
    trg: IntArray


@dataclass(frozen=True)
class Cut:
    """Texts of a split that one limit cuts.

    Attributes:
        split: train, valid or test.
        texts: what is cut: sources, targets, or pairs where both share their room.
        rows: how many there are.
        cut: how many of them lose tokens.
        limit: tokens that are kept, separators included.
        remedy: a setting that would spare nearly all, and what it would cut; "" without a cut.
    """

    split: str
    texts: str
    rows: int
    cut: int
    limit: int
    remedy: str

    def sentence(self) -> str:
        """For a log or a report."""
        if not self.cut:
            return f"{self.split}: no {self.texts[:-1]} is cut at {self.limit} tokens"
        share = percent(self.cut / self.rows)
        return (
            f"{self.split}: {share} of {self.texts} are cut at {self.limit} tokens "
            f"({self.cut:,} of {self.rows:,}); {self.remedy}"
        )

    def numbers(self) -> dict[str, Any]:
        """For a file of measurements."""
        return {
            "split": self.split, "texts": self.texts, "rows": self.rows, "cut": self.cut,
            "limit": self.limit,
        }  # fmt: skip


def lengths_of_cache(split: str, cache: TokenCache) -> Lengths:
    """Lengths of the rows of a token cache, in the direction that is stored."""
    src, trg = np.diff(cache.src_offsets), np.diff(cache.trg_offsets)
    if cache.both_directions:
        src, trg = np.concatenate([src, trg]), np.concatenate([trg, src])
    return Lengths(split, src, trg)


def lengths_of_file(
    split: str, path: Path, tokenizer: TextTokenizer, both: bool = False
) -> Lengths:
    """Lengths of the rows of a file, of which nothing is kept."""
    src: list[int] = []
    trg: list[int] = []
    rows = read_rows(path)
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        sources = tokenizer.encode([row.src for row in chunk])
        src += map(len, sources)
        # An aligned target has a label for each symbol of its source.
        aligned = tokenizer.kind == "aligned"
        trg += map(len, sources if aligned else tokenizer.encode([row.trg for row in chunk]))
    sides = (src + trg, trg + src) if both else (src, trg)
    return Lengths(split, np.array(sides[0]), np.array(sides[1]))


def cuts_of(lengths: Lengths, config: Config) -> list[Cut]:
    """The cuts of a split by a configuration: in training's layout, and of the sources that
    validation and evaluation generate from."""
    cuts = list(_layout_cuts(lengths, config.model)) if lengths.split != "test" else []
    if lengths.split != "train":
        # With positions of its own a source has the same limit in both, unless one is set.
        cuts = [cut for cut in cuts if cut.texts != "sources"]
        cuts.append(_generation_cut(lengths, config))
    return cuts


def _layout_cuts(lengths: Lengths, model: ModelConfig) -> Iterator[Cut]:
    src, trg, split = lengths.src, lengths.trg, lengths.split
    source, length = model.source_positions, model.seq_len
    if model.in_slots:
        yield from _slot_cuts(lengths, model)
        return
    kept = kept_lengths(src - 1, trg - 1, length, source)
    cut_src, cut_trg = kept[0] < src - 1, kept[1] < trg - 1
    if not source:
        together = src + trg + SEPARATORS - 2
        remedy = _proposal(together, length, lambda n: f"model.seq_len = {n}")
        yield Cut(split, "pairs", len(src), _count(cut_src | cut_trg), length, remedy)
        return
    remedy = _proposal(src + 1, source, partial(_longer_source, model))
    yield Cut(split, "sources", len(src), _count(cut_src), source, remedy)
    remedy = _proposal(trg, length - source, lambda n: f"model.seq_len = {source + n}")
    yield Cut(split, "targets", len(trg), _count(cut_trg), length - source, remedy)


def _slot_cuts(lengths: Lengths, model: ModelConfig) -> Iterator[Cut]:
    """Cuts where the target has slots of its own (`data/slots.py`)."""
    # [CLS] and [SEP] of an aligned source take no position, [CLS] of a masked target no slot.
    aligned = model.source == "aligned"
    src = lengths.src - 2 if aligned else lengths.src
    source = model.source_positions
    remedy = _proposal(src, source, partial(_longer_source, model))
    rows = len(src)
    yield Cut(lengths.split, "sources", rows, _count(src > source), source, remedy)
    if not aligned:
        trg, slots = lengths.trg - 1, model.target_slots
        remedy = _proposal(trg, slots, lambda n: f"model.seq_len = {source + n}")
        yield Cut(lengths.split, "targets", rows, _count(trg > slots), slots, remedy)


def _longer_source(model: ModelConfig, positions: int) -> str:
    """The setting that gives a source more positions, and targets no fewer."""
    if model.source == "aligned":
        return f"model.source_positions = {positions} with model.seq_len = {2 * positions}"
    length = model.seq_len - model.source_positions + positions
    also = f" with model.seq_len = {length}" if 2 * positions > model.seq_len else ""
    return f"model.source_positions = {positions}{also}"


def _generation_cut(lengths: Lengths, config: Config) -> Cut:
    model, limit = config.model, config.max_source_tokens
    source = model.source_positions
    # The second [SEP] takes a position that is none of the source's tokens.
    follows = int(source > 0 and not config.data.max_source_tokens and not model.in_slots)

    def longer(tokens: int) -> str:
        if follows:
            return _longer_source(model, tokens)
        if model.in_slots and tokens > config.max_source_tokens:
            return _longer_source(model, tokens)
        if tokens > largest_source(model.seq_len, source, model.source):
            return f"model.seq_len = {2 * tokens}"
        return f"data.max_source_tokens = {tokens}"

    src = lengths.src
    cut = _count(src > limit)
    return Cut(
        lengths.split,
        "sources",
        len(src),
        cut,
        limit,
        _proposal(src + follows, limit + follows, longer),
    )


def _proposal(needed: IntArray, now: int, setting: Callable[[int], str]) -> str:
    """The smallest limit, in steps, that spares nearly all, and the share that it would cut.

    Where the limit of now cuts no more than that, it is one that spares all.
    """
    share = _SPARED if (needed > now).mean() > 1 - _SPARED else 1.0
    longest = int(np.quantile(needed, share, method="inverted_cdf"))
    limit = -(-longest // _MULTIPLE) * _MULTIPLE
    return f"{setting(limit)} would cut {percent(float((needed > limit).mean()))}"


def percent(share: float) -> str:
    """A share as a reader wants it: no cut is never rounded to none."""
    if 0 < share < 0.01:
        return f"{max(100 * share, 0.001):.2g} %"
    return f"{100 * share:.0f} %"


def _count(flags: npt.NDArray[np.bool_]) -> int:
    return int(flags.sum())
