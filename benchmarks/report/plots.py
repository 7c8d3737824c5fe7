"""Pictures of a report: each function draws one figure from rows; None where it has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

from benchmarks.generate import latency as study
from benchmarks.harness.records import Row
from benchmarks.quality import curves
from benchmarks.quality.frontier import JOINT, TEXT_METRICS
from benchmarks.quality.plots import panel
from benchmarks.quality.tables import QUALITY
from dlmone_fast.tasks.paper import PAPER, TABLE_2

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

_DPI = 140
_WIDTH, _HEIGHT = 5.2, 3.8
_FIGURES: dict[str, Callable[[Sequence[Row]], Figure | None]] = {}


def _figure(function: Callable[[Sequence[Row]], Figure | None]) -> Callable[..., Figure | None]:
    _FIGURES[function.__name__] = function
    return function


def draw_all(rows: Sequence[Row], folder: Path) -> dict[str, Path]:
    """Write every figure that the rows are enough for; paths by name."""
    paths: dict[str, Path] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        for name, function in _FIGURES.items():
            _save(function(rows), name, folder, paths)
        for operation in dict.fromkeys(r.operation for r in rows if r.scores):
            task = operation.removeprefix(QUALITY)
            found = [r for r in rows if r.operation == operation]
            _save(frontier(found, task), f"frontier-{task}", folder, paths)
    return paths


def _save(figure: Figure | None, name: str, folder: Path, paths: dict[str, Path]) -> None:
    if figure is not None:
        paths[name] = folder / f"{name}.png"
        figure.savefig(paths[name], dpi=_DPI, metadata={"Software": None})
        plt.close(figure)


def _panels(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(columns * _WIDTH, lines * _HEIGHT), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    flat: list[Axes] = list(axes.flat)
    for unused in flat[count:]:
        unused.set_visible(False)
    return figure, flat[:count]


@_figure
def latency(rows: Sequence[Row]) -> Figure | None:
    """Seconds per sample against network calls, a panel a model."""
    cases = list(dict.fromkeys(r.case for r in rows if r.operation == study.OPERATION))
    if not cases:
        return None
    figure, axes = _panels(len(cases), 2)
    for axis, case in zip(axes, cases, strict=True):
        found = [r for r in rows if r.operation == study.OPERATION and r.case == case and r.mean_ms]
        _latency_panel(axis, found)
        axis.set_title(case)
    _legend_below(figure, axes[0])
    return figure


def _legend_below(figure: Figure, axis: Axes) -> None:
    """One legend for panels of the same systems, where it covers nothing."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)


def _latency_panel(axis: Axes, rows: Sequence[Row]) -> None:
    systems = list(dict.fromkeys(r.implementation.rpartition(", ")[0] for r in rows))
    label = f"{PAPER} (RTX A5000)"
    axis.plot(list(TABLE_2), list(TABLE_2.values()), "s:", color="0.6", ms=3, label=label)
    for system in systems:
        own = sorted((r.at or 0, (r.mean_ms or 0) / 1e3, bool(r.derived)) for r in rows
                     if r.implementation.rpartition(", ")[0] == system)  # fmt: skip
        steps, seconds = [x for x, _, _ in own], [y for _, y, _ in own]
        if len(own) == 1:
            axis.plot(steps, seconds, "*", ms=9, label=f"{system}, 1 call")
            continue
        (line,) = axis.plot(steps, seconds, "-", lw=1.2, label=system)
        for marker, flag in (("o", False), ("x", True)):
            points = [(x, y) for x, y, derived in own if derived == flag]
            if points:
                axis.plot(*zip(*points, strict=True), marker, color=line.get_color(), ms=5)
    if any(r.derived for r in rows):
        axis.plot([], [], "x", color="0.3", label="derived from fewer calls")
    axis.set(xscale="log", yscale="log", xlabel="network calls per sample",
             ylabel="seconds per sample, mean")  # fmt: skip
    shown = [steps for steps in TABLE_2 if steps != 1000]
    axis.set_xticks(shown, [str(steps) for steps in shown])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")


# The tables have the others too.
_DRAWN = ("joint", "bleu", "ibleu", "div_4")


def frontier(rows: Sequence[Row], task: str) -> Figure:
    """Quality against network calls and against milliseconds, a line of panels a metric."""
    over_calls = _curves(rows, "network calls per sample", lambda r: r.at)
    over_time = _curves(rows, "ms per sample (median, batch 1)", lambda r: r.median_ms)
    systems = list(dict.fromkeys(point.system for point in over_calls.points))
    figure, axes = _panels(2 * len(over_calls.metrics), 2)
    for i, metric in enumerate(over_calls.metrics):
        panel(axes[2 * i], over_calls, metric, systems)
        panel(axes[2 * i + 1], over_time, metric, systems)
    _legend_below(figure, axes[0])
    figure.suptitle(task)
    return figure


def _curves(
    rows: Sequence[Row], axis: str, abscissa: Callable[[Row], float | None]
) -> curves.Figure:
    points = [
        curves.Point(r.case, x, r.scores or {}, r.rows_scored)
        for r in rows
        if (x := abscissa(r)) is not None
    ]
    copied = next((r.scores or {} for r in rows if r.case == "copy of the source"), {})
    known = {name for point in points for name in point.scores}
    drawn = (metric for metric in (JOINT, *TEXT_METRICS) if metric.name in _DRAWN)
    metrics = tuple(metric for metric in drawn if metric.name in known)
    return curves.Figure("", axis, metrics, points, copied, logarithmic=True)


@_figure
def scaling(rows: Sequence[Row]) -> Figure | None:
    """Time of a call against batch, length and so on, a panel an axis."""
    prefix = "generate by "
    found = [r for r in rows if r.operation.startswith(prefix) and r.median_ms and r.at]
    operations = list(dict.fromkeys(r.operation for r in found))
    if not operations:
        return None
    figure, axes = _panels(len(operations), 3)
    for axis, operation in zip(axes, operations, strict=True):
        of_axis = [r for r in found if r.operation == operation]
        for name in dict.fromkeys(r.implementation for r in of_axis):
            points = sorted((r.at, r.median_ms) for r in of_axis if r.implementation == name)
            axis.plot(*zip(*points, strict=True), "o-", ms=4, label=name)
        values = sorted({r.at for r in of_axis if r.at})
        axis.set(xscale="log", yscale="log", xlabel=operation.removeprefix(prefix),
                 ylabel="ms per call, median")  # fmt: skip
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.legend(fontsize=7)
    return figure


@_figure
def roofline(rows: Sequence[Row]) -> Figure | None:
    """Each operation's share of the machine's floor: ours, and the best peer."""
    timed = [r for r in rows if r.fraction_of_floor and not r.part and r.operation in _ROOFLINE]
    cases = list(dict.fromkeys((r.operation, r.case) for r in timed))
    if not cases:
        return None
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.42 * len(cases)), layout="constrained")
    for place, key in enumerate(cases):
        found = [r for r in timed if (r.operation, r.case) == key]
        for offset, colour, ours in ((-0.19, "C0", True), (0.19, "0.65", False)):
            # Ours that is preferred, and the best peer of its precision.
            group = [r for r in found if r.ours == ours and r.dtype == found[0].dtype]
            if not group:
                continue
            best = group[0] if ours else max(group, key=lambda r: r.fraction_of_floor or 0)
            share = 100 * (best.fraction_of_floor or 0)
            axis.barh(place + offset, share, height=0.36, color=colour)
            axis.text(share + 1, place + offset, f"{best.implementation} {share:.0f} %",
                      va="center", fontsize=7)  # fmt: skip
    axis.set_yticks(range(len(cases)), [f"{operation}\n{case}" for operation, case in cases],
                    fontsize=7)  # fmt: skip
    axis.invert_yaxis()
    axis.set_xlim(right=axis.get_xlim()[1] * 1.35)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("% of the floor: bytes at copy bandwidth or products at the measured peak")
    return figure


_ROOFLINE = (
    "noise", "forward diffusion", "forward diffusion of tokens", "distillation loss",
    "linear cross-entropy", "rounding", "generate",
)  # fmt: skip
