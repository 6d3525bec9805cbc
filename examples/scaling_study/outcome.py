"""What a study came to: losses and FLOPs of each arm, and what it took to reach the subject's final loss."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from arms import Arm, Run, Study

from megatron_tokenformer.config.sizes import parameter_count

Point = tuple[float, float]
"""FLOPs so far, and the validation loss in nats per token"""


@dataclass(frozen=True)
class Curve:
    """One run's validation losses."""

    seed: int
    points: list[Point]
    growths: list[int]
    """positions in `points` that were measured right after a growth; the one before has the same FLOPs"""
    tokens: int
    """that the run has seen, by its own log"""

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.points[-1][0]

    @property
    def loss(self) -> float:
        """At the end."""
        return self.points[-1][1]

    def flops_at(self, loss: float) -> float | None:
        """FLOPs at which the loss was first reached, on straight lines between evaluations; None if never."""
        before = None
        for point in self.points:
            if point[1] <= loss:
                return point[0] if before is None else crossing(before, point, loss)
            before = point
        return None


@dataclass(frozen=True)
class Outcome:
    """An arm and the runs of it that are done, by seed."""

    arm: Arm
    parameters: int
    curves: list[Curve]


def crossing(one: Point, other: Point, loss: float) -> float:
    """FLOPs at which a line through two points (loss over the logarithm of FLOPs) has a loss."""
    if one[0] <= 0 or one[1] == other[1]:
        return other[0]
    share = (one[1] - loss) / (one[1] - other[1])
    return math.exp(math.log(one[0]) + share * (math.log(other[0]) - math.log(one[0])))


def outcomes(study: Study, done: list[Run]) -> list[Outcome]:
    """What the runs that are done came to, in the study's order of arms."""
    found = []
    for arm in study.arms:
        runs = [run for run in done if run.arm.name == arm.name]
        if runs:
            parameters = parameter_count(runs[0].largest.model)
            found.append(Outcome(arm, parameters, [curve_of(run) for run in runs]))
    return found


def curve_of(run: Run) -> Curve:
    """A run's evaluations, all stages one after another."""
    rows = [(number, row) for number, row in run.rows() if "val_loss" in row]
    points = [(row["flops"], row["val_loss"]) for _, row in rows]
    growths = [place for place, (number, row) in enumerate(rows) if number and row["step"] == 0]
    return Curve(run.seed, points, growths, rows[-1][1]["tokens"])


def own_budget(study: Study, found: list[Outcome], seed: int, loss: float) -> float | None:
    """FLOPs of a reference run that would end at a loss, each with a budget and a schedule of its own.

    On the line through the ends of the two budgets next to it (loss over the logarithm of FLOPs); None if
    there are not two, or the loss is above that of the smallest or below that of the largest.
    """
    ends = sorted(
        (curve.flops, curve.loss)
        for outcome in found
        if study.reference in (outcome.arm.name, outcome.arm.budget_of)
        for curve in outcome.curves
        if curve.seed == seed
    )
    for small, large in itertools.pairwise(ends):
        if large[1] <= loss <= small[1]:
            return crossing(small, large, loss)
    return None


def measures(study: Study, found: list[Outcome], outcome: Outcome) -> list[dict[str, Any]]:
    """For each seed: final loss and FLOPs, FLOPs to the subject's final loss, the subject's over those."""
    subjects = {c.seed: c for o in found if o.arm.name == study.subject for c in o.curves}
    rows = []
    for curve in outcome.curves:
        subject = subjects.get(curve.seed)
        reached = curve.flops_at(subject.loss) if subject else None
        rows.append(
            {
                "seed": curve.seed,
                "val_loss": curve.loss,
                "val_ppl": math.exp(curve.loss),
                "flops": curve.flops,
                "tokens": curve.tokens,
                "flops_to_subjects_loss": reached,
                "subjects_flops_over_that": subject.flops / reached if subject and reached else None,
                "change_at_growths": [
                    curve.points[place][1] / curve.points[place - 1][1] - 1 for place in curve.growths
                ],
            }
        )
    return rows


def as_json(study: Study, found: list[Outcome]) -> dict[str, Any]:
    """All figures and curves."""
    subjects = [c for o in found if o.arm.name == study.subject for c in o.curves]
    return {
        "study": study.model_dump(mode="json"),
        "arms": {
            outcome.arm.name: {
                "title": outcome.arm.title,
                "parameters": outcome.parameters,
                "runs": measures(study, found, outcome),
                "curves": [asdict(curve) for curve in outcome.curves],
            }
            for outcome in found
        },
        "reference_flops_with_own_budget": {
            str(c.seed): own_budget(study, found, c.seed, c.loss) for c in subjects
        },
    }


def render(study: Study, found: list[Outcome]) -> str:
    """The table in Markdown, and what it says of the subject."""
    lines = [
        "| arm | parameters | runs | tokens | FLOPs | final validation loss | perplexity | "
        f"FLOPs to the final loss of '{study.subject}' | its FLOPs / these |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for outcome in found:
        rows = measures(study, found, outcome)
        cells = [outcome.arm.title, f"{outcome.parameters:,}", str(len(rows)), f"{rows[0]['tokens']:,}"]
        forms = {"flops": ".3g", "val_loss": ".4f", "val_ppl": ".2f"}
        forms |= {"flops_to_subjects_loss": ".3g", "subjects_flops_over_that": ".2f"}
        cells += [_spread(rows, key, form) for key, form in forms.items()]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Mean over seeds ± standard deviation.  Losses are in nats per token, FLOPs those of training.",
        "FLOPs to a loss are read off each run's own curve, of the same seed; where the learning rate has",
        "not fallen yet, a curve stands higher than that of a run which was to end there.",
    ]
    return "\n".join([*lines, *_own_budgets(study, found)]) + "\n"


def _own_budgets(study: Study, found: list[Outcome]) -> list[str]:
    """The subject against reference runs whose schedules end where they do."""
    lines = []
    for curve in (c for o in found if o.arm.name == study.subject for c in o.curves):
        needed = own_budget(study, found, curve.seed, curve.loss)
        said = "is outside of what the budgets of it ended at"
        if needed is not None:
            share = curve.flops / needed
            said = f"would take {needed:.3g} FLOPs by its budgets, so growing took {share:.0%} of that"
        lines.append(f"- seed {curve.seed}: the loss {curve.loss:.4f} from scratch {said}.")
    return ["", *lines] if lines else []


def _spread(rows: list[dict[str, Any]], key: str, form: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return "not reached"
    told = f"{statistics.mean(values):{form}}"
    if len(set(values)) > 1:
        told += f" ± {statistics.stdev(values):{form}}"
    return told if len(values) == len(rows) else f"{told} ({len(values)} of {len(rows)} runs)"
