"""Figures as data: scores of several systems over one abscissa."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.records import Score
from dlmone_fast.comparison.quality import Metric
from dlmone_fast.evaluation.table import Table


@dataclass(frozen=True)
class Point:
    """Scores of a system at one abscissa."""

    system: str
    x: float
    scores: Mapping[str, Score]
    n: int


@dataclass(frozen=True)
class Figure:
    """Curves of several metrics over one abscissa.

    Attributes:
        axis: its title.
        logarithmic: whether it spans magnitudes.
        copied: the scores of the source as output, which ask for no model.
        published: points that the paper's tables state.
        note: how it was measured.
    """

    title: str
    axis: str
    metrics: tuple[Metric, ...]
    points: list[Point]
    copied: Mapping[str, Score]
    logarithmic: bool = False
    published: list[Point] = field(default_factory=list)
    note: str = ""

    def table(self) -> Table:
        """A line for each point, then copying the source."""
        titles = [metric.title for metric in self.metrics]
        table = Table(["system", self.axis, "n", *titles])
        for point in [*self.published, *self.points]:
            table.add(point.system, f"{point.x:g}", point.n or None, *self._cells(point.scores))
        if self.copied:
            table.add("copy of the source", None, None, *self._cells(self.copied))
        return table

    def _cells(self, scores: Mapping[str, Score]) -> list[str | None]:
        values: dict[str, Any] = {name: score.value for name, score in scores.items()}
        values["intervals"] = {
            name: (score.low, score.high)
            for name, score in scores.items()
            if score.low is not None and score.high is not None
        }
        return [metric.cell(values) for metric in self.metrics]
