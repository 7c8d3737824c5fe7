"""Figures as pictures: a panel for each metric, systems as curves with their intervals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.quality.curves import Figure, Point
from dlmone_fast.comparison.quality import Metric
from dlmone_fast.errors import BackendUnavailableError, UsageError

_MARKERS = "osD^vPX*"
_PANEL_INCHES = (4.6, 3.4)
_LEGEND_INCHES = 0.3


def check(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before anything is measured for it.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        UsageError: the file is not a .png or its folder does not exist.
    """
    _pyplot()
    if path.suffix != ".png" or not path.resolve().parent.is_dir():
        raise UsageError(f"--plot {path}: expected a .png file in a folder that exists")


def draw(figure: Figure, path: Path) -> None:
    """Write a picture of figure's metrics that were measured."""
    pyplot = _pyplot()
    metrics = [m for m in figure.metrics if any(m.name in p.scores for p in figure.points)]
    columns = 1 if len(metrics) == 1 else 3 if len(metrics) == 3 else 2
    rows = math.ceil(len(metrics) / columns)
    systems = list(dict.fromkeys(p.system for p in [*figure.published, *figure.points]))
    legend_rows = math.ceil((len(systems) + 1) / (2 * columns))
    height = rows * _PANEL_INCHES[1] + legend_rows * _LEGEND_INCHES
    drawing, axes = pyplot.subplots(
        rows, columns, figsize=(columns * _PANEL_INCHES[0], height), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    try:
        for axis in axes.flat[len(metrics) :]:
            axis.set_visible(False)
        for axis, metric in zip(axes.flat, metrics, strict=False):
            panel(axis, figure, metric, systems)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside lower center", ncols=2 * columns, fontsize=8)
        drawing.suptitle(figure.title, fontsize=11)
        drawing.savefig(path, dpi=150)
    finally:
        pyplot.close(drawing)


def panel(axis: Any, figure: Figure, metric: Metric, systems: list[str]) -> None:
    """One metric of every system with its intervals; copying the source as a line."""
    for index, system in enumerate(systems):
        found = [p for p in [*figure.published, *figure.points] if p.system == system]
        points = sorted((p for p in found if metric.name in p.scores), key=lambda p: p.x)
        xs = _dodged([p.x for p in points], index - (len(systems) - 1) / 2, figure)
        ys = [p.scores[metric.name].value for p in points]
        axis.errorbar(
            xs, ys, yerr=_bars(points, metric.name), label=system, color=f"C{index % 10}",
            marker=_MARKERS[index % len(_MARKERS)], markersize=4, linewidth=1.2, capsize=2,
            elinewidth=0.8,
        )  # fmt: skip
    if metric.name in figure.copied:
        value = figure.copied[metric.name].value
        axis.axhline(value, color="0.4", linestyle="--", linewidth=1, label="copy of the source")
    if figure.logarithmic:
        axis.set_xscale("log")
        ticks = sorted({p.x for p in figure.points})
        # Numbers of calls are worth a tick of their own; times are as good as any.
        if all(x == round(x) for x in ticks):
            axis.set_xticks(_apart(ticks), [f"{x:g}" for x in _apart(ticks)])
            axis.minorticks_off()
        else:
            axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel(f"{figure.axis}, logarithmic" if figure.logarithmic else figure.axis)
    axis.set_ylabel(metric.title)
    axis.grid(alpha=0.25, linewidth=0.6)


def _dodged(xs: list[float], place: float, figure: Figure) -> list[float]:
    """Abscissae moved aside a little, so that the intervals of several curves do not overlap."""
    if figure.logarithmic:
        return [x * 1.05**place for x in xs]
    span = max(p.x for p in figure.points) - min(p.x for p in figure.points)
    return [x + 0.012 * place * span for x in xs]


def _bars(points: list[Point], name: str) -> list[list[float]]:
    """Lengths of the interval below and above each value; 0 where there is none.

    A percentile interval may lie to one side of its value, by a hair.
    """
    scores = [p.scores[name] for p in points]
    below = [0.0 if s.low is None else max(0.0, s.value - s.low) for s in scores]
    above = [0.0 if s.high is None else max(0.0, s.high - s.value) for s in scores]
    return [below, above]


def _apart(ticks: list[float]) -> list[float]:
    """Those ticks of a logarithmic axis whose labels do not touch, the first and the last kept."""
    kept = ticks[:1]
    for tick in ticks[1:]:
        if tick >= 1.8 * kept[-1]:
            kept.append(tick)
    return kept


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise BackendUnavailableError(
            f"--plot needs matplotlib, which cannot be imported ({error}); install it, or leave "
            "--plot out: the table holds the same numbers"
        ) from error
    return pyplot
