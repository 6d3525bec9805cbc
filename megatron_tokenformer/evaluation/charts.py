"""What is drawn of runs: panels of lines and marks, for a picture (`picture.py`) or a page (`page.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_tokenformer.evaluation.curves import Curve, Stage

Axis = Literal["step", "tokens", "flops", "seconds"]
X_LABELS = {
    "step": "step",
    "tokens": "training tokens",
    "flops": "cumulative training FLOPs",
    "seconds": "seconds of training",
}
Y_LABELS = {
    "loss": "loss (nats per token)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens / s",
    "mfu": "MFU",
    "val_loss": "validation loss (nats per token)",
    "val_ppl": "validation perplexity",
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#555555")
"""Okabe and Ito's, which people with any sight can tell apart, and two more"""
MOST_POINTS = 4_000
"""of a line; more are not seen on any paper or screen"""
LONG = 1_000
"""points of a curve whose first fiftieth may be left out of the picture"""
RESIZINGS = ("growth", "net2net", "shrink")
"""events that make another model of the one before"""
SETBACKS = {
    "skipped": ("step skipped", "#555555"),
    "spike": ("spike", "#e69f00"),
    "rollback": ("rollback", "#cc0000"),
    "stop": ("run ended", "#000000"),
}
MARKS = {"growth": ("growth", "#555555"), **SETBACKS}
"""kinds of marks: what the legend calls them, and its colour"""


@dataclass(frozen=True)
class Line:
    """Points that are joined, with a gap where y is NaN."""

    label: str
    colour: str
    x: np.ndarray
    y: np.ndarray
    style: Literal["raw", "mean", "points"] = "mean"
    """thin and pale; thick; or thick with a dot at each point"""
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at an x."""

    x: float
    kind: str
    """one of MARKS"""
    text: str
    y: float | None = None
    """where on a curve; None: over the whole height"""
    colour: str = "#555555"


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    y_label: str
    lines: list[Line]
    log_y: bool = False
    percent: bool = False
    from_zero: bool = False
    top: float | None = None
    """what lies above is left out of the picture, as the first steps of a long run"""


@dataclass(frozen=True)
class Chart:
    """Panels over one x axis, with the marks of all of them."""

    title: str
    x_label: str
    log_x: bool
    panels: list[Panel]
    marks: list[Mark] = field(default_factory=list)


def run_chart(curves: Sequence[Curve], x: Axis = "step", smooth: int | None = None, title: str = "") -> Chart:
    """Loss, learning rate, gradient norm and throughput of runs, with all that happened to them.

    Args:
        smooth: rows in the running means; by default a hundredth of the rows, 1 to 1,000.
    """
    panels = [_loss_panel(curves, x, smooth)]
    for name in ("lr", "grad_norm", "tokens_per_s", "mfu"):
        lines = [
            line
            for curve, colour in _coloured(curves)
            for line in _lines(
                curve.label, colour, *_joined(curve, x, name), smooth=0 if name == "lr" else smooth
            )
        ]
        if lines:
            rate = name in ("tokens_per_s", "mfu")
            panels.append(Panel(Y_LABELS[name], lines, name == "grad_norm", name == "mfu", rate))
    marks = [mark for curve in curves for mark in (*_growths(curve, x), *_setbacks(curve, x))]
    return Chart(title, X_LABELS[x], False, [panel for panel in panels if panel.lines], marks)


def scaling_chart(
    curves: Sequence[Curve], x: Axis = "flops", y: Literal["val_loss", "val_ppl"] = "val_ppl", title: str = ""
) -> Chart:
    """Validation loss or perplexity against what it cost, over all stages; growths where they were.

    One curve has a colour for each of its stages, several have one colour each.  A point at 0 has no place on
    a logarithmic axis and is left out.
    """
    lines, marks = [], []
    alone = len(curves) == 1 and len(curves[0].stages) > 1
    for number, curve in enumerate(curves):
        named = False
        for index, stage in enumerate(curve.stages):
            colour = COLOURS[(index if alone else number) % len(COLOURS)]
            places = stage.evaluations[x] + curve.before(index, x)
            seen = np.flatnonzero((places > 0) & ~np.isnan(stage.evaluations[y]))
            if len(seen) == 0:
                continue
            label = stage.name if alone else "" if named else curve.label
            named = True
            values = stage.evaluations[y][seen]
            lines.append(Line(label, colour, *thinned(places[seen], values), style="points"))
            if index:
                text = _growth_text(curve.stages[index - 1], stage)
                marks.append(Mark(float(places[seen[0]]), "growth", text, float(values[0]), colour))
    panels = [Panel(Y_LABELS[y], lines, log_y=True)] if lines else []
    return Chart(title, X_LABELS[x], True, panels, marks)


def _loss_panel(curves: Sequence[Curve], x: Axis, smooth: int | None) -> Panel:
    lines, tops = [], []
    for curve, colour in _coloured(curves):
        drawn = _lines(curve.label, colour, *_joined(curve, x, "loss"), smooth=smooth)
        lines += drawn
        if drawn:
            tops.append(_top(drawn[-1].y))
        places, values = _joined(curve, x, "val_loss")
        seen = ~np.isnan(values)
        if seen.any():
            dark = _darker(colour)
            label = f"{curve.label}, validation"
            lines.append(Line(label, dark, *thinned(places[seen], values[seen]), style="points"))
    top = None if None in tops or not tops else max(top for top in tops if top is not None)
    return Panel(Y_LABELS["loss"], lines, top=top)


def _top(mean: np.ndarray) -> float | None:
    """Of a long curve, what leaves its steep beginning out, so that the rest can be seen: not its spikes."""
    later = mean[len(mean) // 50 :]
    if len(mean) < LONG or np.isnan(later).all():
        return None
    low, high = np.nanmin(mean), np.nanmax(later)
    return float(high + 0.5 * (high - low)) if high > low else None


def _coloured(curves: Sequence[Curve]) -> Iterator[tuple[Curve, str]]:
    for number, curve in enumerate(curves):
        yield curve, COLOURS[number % len(COLOURS)]


def _joined(curve: Curve, x: Axis, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of all stages against the x axis, which goes on over them."""
    tables = [stage.evaluations if name.startswith("val_") else stage.training for stage in curve.stages]
    places = [table[x] + curve.before(index, x) for index, table in enumerate(tables)]
    return np.concatenate(places), np.concatenate([table[name] for table in tables])


def _lines(label: str, colour: str, x: np.ndarray, y: np.ndarray, smooth: int | None) -> list[Line]:
    """The numbers as they are, pale, under their running mean; or alone, if there is no mean to take."""
    if len(y) == 0 or np.isnan(y).all():
        return []
    rows = min(max(len(y) // 100, 1), 1_000) if smooth is None else smooth
    if rows <= 1:
        return [Line(label, colour, *thinned(x, y))]
    raw = Line("", colour, *thinned(x, y), style="raw")
    return [raw, Line(label, colour, *thinned(x, running_mean(y, rows)))]


def running_mean(y: np.ndarray, rows: int) -> np.ndarray:
    """Mean of the last `rows` values at each place (of fewer at the start); NaNs do not count, and stay."""
    known = ~np.isnan(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    stop = np.arange(1, len(y) + 1)
    start = np.maximum(stop - rows, 0)
    with np.errstate(invalid="ignore"):
        means = (sums[stop] - sums[start]) / (counts[stop] - counts[start])
    return np.where(known, means, np.nan)


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most so many of the points, with the lowest and highest of each stretch, so that no spike is lost.

    A stretch that has a NaN keeps one, and so its gap.
    """
    if len(x) <= most:
        return x, y
    width = -(-len(x) * 3 // most)
    kept = {0, len(x) - 1}
    for start in range(0, len(x), width):
        part = y[start : start + width]
        unknown = np.isnan(part)
        if unknown.any():
            kept.add(start + int(unknown.argmax()))
        if not unknown.all():
            kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
    places = np.array(sorted(kept))
    return x[places], y[places]


def _growths(curve: Curve, x: Axis) -> Iterator[Mark]:
    for index, stage in enumerate(curve.stages):
        told = [event for event in stage.events if event["event"] in RESIZINGS]
        if index or told:
            place = (
                stage.first(x) + curve.before(index, x)
                if x in ("tokens", "flops")
                else curve.before(index, x)
            )
            previous = curve.stages[index - 1] if index else None
            yield Mark(float(place), "growth", _growth_text(previous, stage))


def _growth_text(before: Stage | None, after: Stage) -> str:
    event = next((event for event in after.events if event["event"] in RESIZINGS), {})
    told = {key: value for key, value in event.items() if isinstance(value, (int, float))}
    old = told.get("parameters_before") or (before.parameters if before else None)
    new = told.get("parameters_after") or after.parameters
    text = f"{in_short(old)} → {in_short(new)}" if old and new else "growth"
    was, now = told.get("val_loss_before"), told.get("val_loss_after")
    return f"{text}, loss {was:.4f} → {now:.4f}" if was is not None and now is not None else text


def _setbacks(curve: Curve, x: Axis) -> Iterator[Mark]:
    for index, stage in enumerate(curve.stages):
        for event in stage.events:
            action = event.get("action")
            if action is None:
                continue
            kind = {"rollback": "rollback", "stop": "stop", "log": "spike"}.get(action, "skipped")
            place = (
                np.interp(event["step"], stage.training["step"], stage.training[x]) if _any(stage) else 0.0
            )
            place = event["step"] if x == "step" else place
            yield Mark(
                float(place) + curve.before(index, x), kind, _setback_text(event), colour=SETBACKS[kind][1]
            )


def _any(stage: Stage) -> bool:
    return len(stage.training["step"]) > 0


def _setback_text(event: dict[str, Any]) -> str:
    what = {"loss": "loss not finite", "gradient": "gradient not finite", "spike": "loss spiked"}
    told = f"step {event.get('spike_step', event['step'])}: {what.get(event['event'], event['event'])}"
    action = {"skip": "skipped", "log": "kept", "stop": "the run ended"}.get(event["action"])
    return f"{told}, {action or 'back to step ' + str(event['step'])}"


def in_short(count: float | None) -> str:
    """A count for people: 123.6M."""
    if count is None:
        return "-"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:g}"


def _darker(colour: str) -> str:
    parts = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{int(part * 0.55):02x}" for part in parts)
