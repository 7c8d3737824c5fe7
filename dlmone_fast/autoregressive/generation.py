"""A trained autoregressive model in use: texts in, texts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlmone_fast.autoregressive.batches import Ragged
from dlmone_fast.autoregressive.decode import (
    Marks,
    Sampling,
    Written,
    decode_beams,
    decode_one_by_one,
)
from dlmone_fast.autoregressive.folder import StoredModel, read_model
from dlmone_fast.autoregressive.model import EncoderDecoder
from dlmone_fast.autoregressive.precision import for_inference, is_bf16
from dlmone_fast.autoregressive.vocabulary import Vocabulary
from dlmone_fast.errors import PromptError, UsageError
from dlmone_fast.evaluation.seeds import MAX_SEED, row_seeds
from dlmone_fast.models.plainfiles import StrPath

METHODS = ("greedy", "beam", "sample")


@dataclass(frozen=True)
class Generated:
    """Texts of each source, best or first candidate first, and what the model thinks of them."""

    texts: list[list[str]]
    scores: list[list[float]]
    """Log probability of each text at temperature 1, its end included."""
    ended: list[list[bool]]
    """Whether each text came to its end before the model's last position."""
    truncated: list[bool]
    """Whether a source was cut."""


@dataclass(frozen=True)
class Method:
    """A decoding method and its settings; see `Autoregressive.generate`."""

    name: str = "greedy"
    num_candidates: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    beams: int = 4
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise UsageError(f"method: expected {', '.join(METHODS)}, got {self.name!r}")
        for name, low, high in (
            ("num_candidates", 1, 1024),
            ("temperature", 1e-3, 100),
            ("top_p", 1e-6, 1),
            ("top_k", 0, 1 << 20),
            ("beams", 1, 256),
            ("length_penalty", 0, 10),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UsageError(f"{name}: expected a number, got {value!r:.80}")
            if not low <= value <= high:
                raise UsageError(f"{name}: expected {low:g} to {high:g}, got {value:g}")
        most = {"greedy": 1, "beam": self.beams}.get(self.name, self.num_candidates)
        if self.num_candidates > most:
            raise UsageError(
                f"num_candidates: method {self.name!r} gives at most {most}, got "
                f"{self.num_candidates}; use method='sample', or more beams"
            )


class Autoregressive:
    """A model and its vocabulary.

    Args:
        model: the network; its weights are copied.
        vocabulary: text ↔ ids.
        precision: fp32, bf16, or auto: bf16 where the hardware multiplies it natively.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        vocabulary: Vocabulary,
        precision: str = "auto",
        sha256: str = "",
    ) -> None:
        if precision not in ("auto", "fp32", "bf16"):
            raise UsageError(f"precision: expected auto, fp32 or bf16, got {precision!r}")
        self.config = model.config
        self.vocabulary = vocabulary
        self.sha256 = sha256
        """Of the folder's manifest; empty for a model that comes from none."""
        self._network = for_inference(model, is_bf16(precision))
        self._marks = Marks(vocabulary.start_id, vocabulary.end_id, vocabulary.never)

    def generate(
        self,
        texts: str | Sequence[str],
        *,
        method: str = "greedy",
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        beams: int = 4,
        length_penalty: float = 1.0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 256,
        on_overflow: str = "error",
    ) -> str | list[str]:
        """One text of each source; a str gives a str.

        Args:
            texts: sources.
            method: greedy; beam: the best of a beam search with `beams`, by the mean log
                probability of a token (its length to the power of `length_penalty`); sample: drawn
                at `temperature` from the `top_k` most likely tokens (0: all) that make up `top_p`.
            seed: row i is drawn from a seed that is a function of it and i.
            seeds: instead, a seed for each text.
            on_overflow: error, or truncate: cut a source that the model has no positions for.

        Raises:
            PromptError: a text is empty, too long, or has a character that the model lacks.
            UsageError: another argument cannot be used.
        """
        several = [texts] if isinstance(texts, str) else texts
        how = Method(method, 1, temperature, top_p, top_k, beams, length_penalty)
        result = self.generate_candidates(
            several, how, seed=seed, seeds=seeds, batch_size=batch_size, on_overflow=on_overflow
        )
        found = [candidates[0] for candidates in result.texts]
        return found[0] if isinstance(texts, str) else found

    def generate_candidates(
        self,
        texts: Sequence[str],
        method: Method | None = None,
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 256,
        on_overflow: str = "error",
        progress: Callable[[int], None] | None = None,
    ) -> Generated:
        """`num_candidates` texts of each source with their scores; arguments as for `generate`.

        A beam search may find fewer different texts than it has beams; then there are fewer.
        `progress` is called with the number of sources after each batch.
        """
        method = method or Method()
        seeds = self._seeds(len(texts), seed, seeds)
        if on_overflow not in ("error", "truncate") or not 1 <= batch_size <= 1 << 16:
            raise UsageError(
                "expected on_overflow 'error' or 'truncate' and batch_size 1 to 65536, got "
                f"{on_overflow!r} and {batch_size!r}"
            )
        ids, truncated = self._sources(texts, on_overflow)
        found: list[list[Written]] = [[] for _ in ids]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            written = self._batch([ids[i] for i in rows], [seeds[i] for i in rows], method)
            for row, candidates in zip(rows, written, strict=True):
                found[row] = candidates
            if progress is not None:
                progress(len(rows))
        return Generated(
            [[self.vocabulary.text(one.ids) for one in row] for row in found],
            [[one.score for one in row] for row in found],
            [[one.ended for one in row] for row in found],
            truncated,
        )

    def faults(self, texts: Sequence[str]) -> list[str | None]:
        """Why each source is not read as it is written; None if it is."""
        known = self.vocabulary.reads(texts)
        readable = [text for text, is_known in zip(texts, known, strict=True) if is_known]
        lengths = iter([len(ids) for ids in self.vocabulary.sources(readable)])
        most = self.config.source_positions
        return [
            "unknown symbols" if not is_known else "too long" if next(lengths) > most else None
            for is_known in known
        ]

    def _batch(self, ids: list[list[int]], seeds: list[int], method: Method) -> list[list[Written]]:
        many = method.num_candidates
        network, most = self._network, self.config.target_positions
        if method.name == "beam":
            source, padded = self._padded(ids)
            beams = decode_beams(
                network, source, padded, self._marks, most, method.beams, method.length_penalty
            )
            return [row[:many] for row in beams]
        source, padded = self._padded([row for row in ids for _ in range(many)])
        sampling = None
        if method.name == "sample":
            sampling = Sampling(method.temperature, method.top_p, method.top_k)
        flat = decode_one_by_one(
            network, source, padded, self._marks, most, sampling,
            [seed for seed in seeds for _ in range(many)], list(range(many)) * len(ids),
        )  # fmt: skip
        return [flat[i : i + many] for i in range(0, len(flat), many)]

    def _padded(self, ids: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        ragged = Ragged(ids)
        block = ragged.padded(np.arange(len(ids)), self.vocabulary.pad_id)
        if ragged.lengths.min() == block.shape[1]:
            return torch.from_numpy(block), None
        empty = np.arange(block.shape[1])[None] >= ragged.lengths[:, None]
        return torch.from_numpy(block), torch.from_numpy(empty)

    def _sources(
        self, texts: Sequence[str], on_overflow: str
    ) -> tuple[list[list[int]], list[bool]]:
        ids = self.vocabulary.sources(texts)
        most = self.config.source_positions
        truncated = [len(row) > most for row in ids]
        if any(truncated) and on_overflow == "error":
            at = truncated.index(True)
            raise PromptError(
                f"texts[{at}]: {len(ids[at])} tokens, the model reads {most}; shorten it, or pass "
                "on_overflow='truncate'"
            )
        end = self.vocabulary.end_id
        return [
            [*row[: most - 1], end] if cut else row for row, cut in zip(ids, truncated, strict=True)
        ], truncated

    @staticmethod
    def _seeds(count: int, seed: int, seeds: Sequence[int] | None) -> list[int]:
        if seeds is None:
            if not 0 <= seed <= MAX_SEED:
                raise UsageError(f"seed: expected 0 to {MAX_SEED}, got {seed}")
            return row_seeds(seed, count)
        if len(seeds) != count:
            raise UsageError(f"seeds: expected one for each of {count} texts, got {len(seeds)}")
        return list(seeds)


def load_autoregressive(folder: StrPath, precision: str = "auto") -> Autoregressive:
    """Load a model folder that `dlmone_fast.train_autoregressive` wrote.

    Raises:
        ModelFileError: the folder is missing, damaged or of another kind.
    """
    return of_stored(read_model(folder), precision)


def of_stored(stored: StoredModel, precision: str = "auto") -> Autoregressive:
    """A model in use from one that was read."""
    return Autoregressive(stored.model, stored.vocabulary, precision, stored.sha256)
