"""The picture of a study: validation perplexity against cumulative training FLOPs."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from arms import Study
from outcome import Curve, Outcome


def draw(study: Study, found: list[Outcome], path: Path) -> None:
    """Seeds as thin lines, their mean as a thick one, growths marked; shorter budgets of an arm are dashed.

    What was measured before the first step has no place on a logarithmic axis and is left out.
    """
    import matplotlib  # half a second, and only needed here

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, ScalarFormatter

    colours = {arm.name: f"C{number % 10}" for number, arm in enumerate(study.arms)}
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for outcome in found:
        arm = outcome.arm
        style = {"color": colours[arm.budget_of or arm.name], "linestyle": "--" if arm.budget_of else "-"}
        for curve in outcome.curves:
            axes.plot(*_line(curve), linewidth=0.6, alpha=0.5, **style)
        flops, mean = _mean(outcome.curves)
        axes.plot(flops, mean, linewidth=2.2, label=arm.title, **style)
        first = outcome.curves[0]
        places = [place - (len(first.points) - len(flops)) for place in first.growths]
        marked = [flops[place] for place in places], [mean[place] for place in places]
        axes.plot(*marked, "D", markersize=8, fillstyle="none", color=style["color"])
    axes.plot([], [], "D", markersize=8, fillstyle="none", color="grey", label="growth")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("cumulative training FLOPs")
    axes.set_ylabel("validation perplexity")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title=f"thin: seeds {', '.join(map(str, study.seeds))}; thick: their mean")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _line(curve: Curve) -> tuple[list[float], list[float]]:
    points = [(flops, math.exp(loss)) for flops, loss in curve.points if flops > 0]
    return [flops for flops, _ in points], [perplexity for _, perplexity in points]


def _mean(curves: list[Curve]) -> tuple[list[float], list[float]]:
    """Runs of one arm are evaluated at the same FLOPs; the mean is of losses, as perplexities multiply."""
    lines = [_line(curve) for curve in curves]
    means = [math.exp(statistics.mean(map(math.log, values))) for values in zip(*(ys for _, ys in lines))]
    return lines[0][0][: len(means)], means
