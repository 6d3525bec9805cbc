"""The chart of a study: validation perplexity against cumulative training FLOPs."""

from __future__ import annotations

import numpy as np
from arms import Study
from outcome import Curve, Outcome

from megatron_tokenformer.evaluation.charts import COLOURS, X_LABELS, Y_LABELS, Chart, Line, Mark, Panel


def study_chart(study: Study, found: list[Outcome]) -> Chart:
    """Seeds as thin lines, their mean as a thick one, growths marked; shorter budgets of an arm are dashed.

    What was measured before the first step has no place on a logarithmic axis and is left out.
    """
    colours = {arm.name: COLOURS[number % len(COLOURS)] for number, arm in enumerate(study.arms)}
    lines, marks = [], []
    for outcome in found:
        arm = outcome.arm
        colour, dashed = colours[arm.budget_of or arm.name], arm.budget_of is not None
        drawn = [_points(curve) for curve in outcome.curves]
        lines += [Line("", colour, *points, style="raw", dashed=dashed) for points in drawn]
        # Runs of one arm are evaluated at the same FLOPs; the mean is of losses, as perplexities multiply.
        count = min(len(flops) for flops, _ in drawn)
        flops, mean = drawn[0][0], np.exp(np.mean([np.log(values[:count]) for _, values in drawn], axis=0))
        lines.append(Line(arm.title, colour, flops[:count], mean, dashed=dashed))
        first = outcome.curves[0]
        for place in (growth - (len(first.points) - len(flops)) for growth in first.growths):
            marks.append(Mark(flops[place], "growth", "growth", mean[place], colour))
    title = f"thin: seeds {', '.join(map(str, study.seeds))}; thick: their mean"
    return Chart(title, X_LABELS["flops"], True, [Panel(Y_LABELS["val_ppl"], lines, log_y=True)], marks)


def _points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    flops, losses = np.array([point for point in curve.points if point[0] > 0]).T
    return flops, np.exp(losses)
