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

# A model, its network calls, and a teacher's sampler.
Timed = tuple[Generator, int, str | None]


class Measuring:
    """A task's rows and measures; every system gets the same rows, in order, and seeds.

    Args:
        rows: the test rows.
        quality: what is scored.
        normalize_text: text in the models' spelling, as which sources and, if the quality asks
            for it, references are scored.
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
        self.references = quality.references(rows, normalize_text)
        self._known = quality.known(rows, normalize_text)

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
        found = self.quality.score(self.sources[:n], self._known[:n], texts, self.bootstrap)
        return dict(found)

    def latency(self, model: Generator, steps: int, sampler: str | None) -> float:
        """Median seconds of a whole call, text in and text out, for one prompt."""
        return statistics.median(self.latencies([(model, steps, sampler)])[0])

    def latencies(self, systems: Sequence[Timed]) -> list[list[float]]:
        """Seconds of each timed call of each system: up to 100 of them, fewer where they take long.

        Systems take turns, so that a machine that slows down slows all of them.
        """
        counts = [self._affordable_calls(system) for system in systems]
        rounds = max(counts)
        seconds: list[list[float]] = [[] for _ in systems]
        for done in range(rounds):
            for system, count, times in zip(systems, counts, seconds, strict=True):
                if (done + 1) * count // rounds > done * count // rounds:
                    times.append(self._seconds(system, len(times)))
        return seconds

    def _affordable_calls(self, system: Timed) -> int:
        expected = self._seconds(system, 0)
        # What a first call sets up is not what later ones take.
        if expected < _LATENCY_SECONDS / 4:
            expected = min(expected, self._seconds(system, 0))
        return max(2, min(_LATENCY_RUNS, round(_LATENCY_SECONDS / expected)))

    def _seconds(self, system: Timed, index: int) -> float:
        model, steps, sampler = system
        source = self.rows[index % min(len(self.rows), _LATENCY_RUNS)].src
        started = time.perf_counter()
        model.generate(source, steps=steps, sampler=sampler, on_overflow="truncate", progress=False)
        return time.perf_counter() - started
