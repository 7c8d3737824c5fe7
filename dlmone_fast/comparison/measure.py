"""Quality and speed of one system on the rows of a task: what a table's row is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from dlmone_fast.comparison.quality import Quality
from dlmone_fast.data.rows import Row
from dlmone_fast.evaluation.seeds import row_seeds
from dlmone_fast.runtime import Generator

_LATENCY_RUNS = 100
_LATENCY_SECONDS = 4.0


class Measuring:
    """A task's rows and measures; every system gets the same rows, in order, and seeds.

    Args:
        rows: the test rows.
        quality: what is scored.
        normalize_text: text as the models' tokenizer writes it, as which sources and references
            are scored.
        seed: of the texts.
        batch_size: rows a network call, of the texts that are scored.
        bootstrap: resamples of the 95 % intervals.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        quality: Quality,
        normalize_text: Callable[[str], str],
        *,
        seed: int,
        batch_size: int,
        bootstrap: int,
    ) -> None:
        self.rows, self.quality = rows, quality
        self.seed, self.batch_size, self.bootstrap = seed, batch_size, bootstrap
        self.sources = [normalize_text(row.src) for row in rows]
        self.references = [normalize_text(row.trg) for row in rows]

    def texts(
        self, model: Generator, steps: int, sampler: str | None, rows: int, candidates: int
    ) -> list[list[str]]:
        """Candidates [rows][candidates] of a model for the first rows."""
        batch = model.generate_candidates(
            [row.src for row in self.rows[:rows]],
            num_candidates=candidates,
            steps=steps,
            sampler=sampler,
            seeds=row_seeds(self.seed, min(rows, len(self.rows))),
            batch_size=self.batch_size,
            on_overflow="truncate",
        )
        return batch.texts

    def scores(
        self, model: Generator, steps: int, sampler: str | None, rows: int, candidates: int
    ) -> dict[str, Any]:
        """Scores of a model on the first rows."""
        return self.score_texts(self.texts(model, steps, sampler, rows, candidates))

    def score_texts(self, texts: list[list[str]]) -> dict[str, Any]:
        """Scores of candidates [n][candidates] of the first n rows."""
        n = len(texts)
        found = self.quality.score(self.sources[:n], self.references[:n], texts, self.bootstrap)
        return dict(found)

    def latency(self, model: Generator, steps: int, sampler: str | None) -> float:
        """Median seconds of a whole call, text in and text out, for one prompt."""
        return statistics.median(self.latencies(model, steps, sampler))

    def latencies(self, model: Generator, steps: int, sampler: str | None) -> list[float]:
        """Seconds of each timed call: up to 100 of them, fewer where they take long."""
        sources = [row.src for row in self.rows[:_LATENCY_RUNS]]

        def call(source: str) -> None:
            model.generate(
                source, steps=steps, sampler=sampler, on_overflow="truncate", progress=False
            )

        call(sources[0])
        times: list[float] = []
        while len(times) < _LATENCY_RUNS and (len(times) < 2 or sum(times) < _LATENCY_SECONDS):
            started = time.perf_counter()
            call(sources[len(times) % len(sources)])
            times.append(time.perf_counter() - started)
        return times
