"""A chart as a picture, by matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.charts import SETBACKS, Chart, Line, Mark, Panel, in_short

FORMATS = (".png", ".pdf", ".svg")


def can_draw() -> bool:
    """Whether matplotlib is installed: it is an extra."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(chart: Chart, path: Path) -> None:
    """Write a chart that has panels as PNG, PDF or SVG, as the name says.

    Raises:
        UserError: there is no matplotlib.
    """
    if not can_draw():
        raise UserError(
            "pictures need matplotlib: pip install 'megatron-tokenformer[plots]'; or write an .html"
        )
    import matplotlib  # half a second, and only needed here

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = _panels(plt, len(chart.panels))
        for number, (panel, place) in enumerate(zip(chart.panels, axes)):
            named = _draw_panel(place, panel)
            _draw_marks(place, chart.marks, first=number == 0)
            if chart.log_x:
                place.set_xscale("log")
            _format_axes(place, chart, panel)
            if number == 0:
                _legend(place, chart, named)
        if chart.title:
            figure.suptitle(chart.title, fontsize=10, parse_math=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _panels(plt: Any, count: int) -> tuple[Any, list[Any]]:
    """One large pair of axes, and the others below in rows of two."""
    if count == 1:
        figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
        return figure, [axes]
    rows = 2 + count // 2
    figure = plt.figure(figsize=(9.0, 2.1 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    axes = [figure.add_subplot(grid[:2, :])]
    for number in range(count - 1):
        wide = number == count - 2 and number % 2 == 0
        where = grid[2 + number // 2, :] if wide else grid[2 + number // 2, number % 2]
        axes.append(figure.add_subplot(where, sharex=axes[0]))
    return figure, axes


def _draw_panel(axes: Any, panel: Panel) -> list[tuple[Any, str]]:
    """Draw all lines; those that have a label come back with it."""
    drawn = [(_draw_line(axes, line), line.label) for line in panel.lines]
    if panel.log_y:
        axes.set_yscale("log")
    axes.set_ylabel(panel.y_label)
    return [(handle, label) for handle, label in drawn if label]


def _draw_line(axes: Any, line: Line) -> Any:
    looks: dict[str, dict[str, Any]] = {
        "raw": {"linewidth": 0.6, "alpha": 0.35},
        "mean": {"linewidth": 1.6},
        "points": {"linewidth": 1.4, "marker": "o", "markersize": 3.0 if len(line.x) < 80 else 0.0},
    }
    dashes = "--" if line.dashed else "-"
    (drawn,) = axes.plot(line.x, line.y, color=line.colour, linestyle=dashes, **looks[line.style])
    if line.style != "points":
        # A point between two gaps has no neighbour to be joined with.
        alone = line.y == line.y
        alone[1:] &= line.y[:-1] != line.y[:-1]
        alone[:-1] &= line.y[1:] != line.y[1:]
        axes.plot(line.x[alone], line.y[alone], ".", color=line.colour, markersize=2)
    return drawn


def _draw_marks(axes: Any, marks: Sequence[Mark], first: bool) -> None:
    edge = axes.get_xaxis_transform()
    for mark in marks:
        if mark.y is not None:
            axes.plot(mark.x, mark.y, "D", color=mark.colour, markersize=8, fillstyle="none")
            axes.axvline(mark.x, color=mark.colour, linestyle=":", linewidth=0.9)
        elif mark.kind == "growth":
            axes.axvline(mark.x, color="#555555", linestyle="--", linewidth=0.9)
            if first:
                style = {"fontsize": 7.5, "rotation": 90, "va": "top", "ha": "left", "color": "#333333"}
                beside = {"xytext": (3, 0), "textcoords": "offset points"}
                axes.annotate(mark.text, (mark.x, 0.985), xycoords=edge, **beside, **style)
    for kind, (_, colour) in SETBACKS.items():
        places = [mark.x for mark in marks if mark.kind == kind]
        if places:
            axes.plot(
                places, [0.0] * len(places), "|", transform=edge, color=colour, markersize=9, clip_on=False
            )
            if first:
                axes.plot(places, [0.03] * len(places), "v", transform=edge, color=colour, markersize=5)


def _format_axes(axes: Any, chart: Chart, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    axes.grid(alpha=0.25, which="both" if chart.log_x else "major", linewidth=0.5)
    axes.set_xlabel(chart.x_label)
    axes.margins(x=0.01 if not chart.log_x else 0.05)
    if not chart.log_x and axes.get_xlim()[1] >= 1e5:
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    low, high = axes.get_ylim()
    if panel.log_y and high < 100 * low:
        # Less than two decades: plain numbers, at more places than the tens.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.log_y and high < 1e5:
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif not panel.log_y:
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    if panel.from_zero:
        axes.set_ylim(0.0, 1.03 * high)
    if panel.top is not None and panel.top < high:
        axes.set_ylim(top=panel.top)


def _plain(value: float, _: int | None = None) -> str:
    return in_short(value) if abs(value) >= 1e4 else f"{value:g}"


def _legend(axes: Any, chart: Chart, named: list[tuple[Any, str]]) -> None:
    kinds = {mark.kind for mark in chart.marks}
    if "growth" in kinds:
        style = {"marker": "D", "fillstyle": "none"} if chart.log_x else {}
        (growth,) = axes.plot([], [], color="#555555", linestyle=":" if chart.log_x else "--", **style)
        named = [*named, (growth, "growth")]
    for kind, (label, colour) in SETBACKS.items():
        if kind in kinds:
            (setback,) = axes.plot([], [], "v", color=colour, markersize=5)
            named = [*named, (setback, label)]
    handles, labels = [handle for handle, _ in named], [label for _, label in named]
    columns = 1 if chart.log_x else 2
    legend = axes.legend(
        handles, ["label"] * len(labels), frameon=False, fontsize=8, ncols=columns, loc="best"
    )
    # Given to the legend itself, a label that begins with "_" is left out, and one with "$" is a formula.
    for text, label in zip(legend.get_texts(), labels):
        text.set(text=label, parse_math=False)
