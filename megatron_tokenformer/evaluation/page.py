"""A chart as one HTML page that needs nothing else: curves to look into, figures at the end, configs."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.evaluation.charts import MARKS, Chart, in_short
from megatron_tokenformer.evaluation.curves import Curve, Stage

SCRIPT, STYLE = Path(__file__).with_name("page.js"), Path(__file__).with_name("page.css")
MAIN_KEYS = (
    *("model.architecture", "model.layers", "model.hidden_size", "model.attention_heads", "model.tokens"),
    *("model.score_norm", "model.vocab_size", "data.train", "data.sequence_length", "parallel.tensor"),
    *("parallel.pipeline", "parallel.sequence", "optimizer.lr", "optimizer.min_lr", "optimizer.schedule"),
    *("optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_grad", "training.steps"),
    *("training.global_batch_size", "training.micro_batch_size", "training.precision", "training.seed"),
)


def write_page(chart: Chart, curves: Sequence[Curve], path: Path) -> None:
    """Write a chart of these curves, and what is known of their runs, as one file of HTML."""
    title = html.escape(chart.title or ", ".join(curve.label for curve in curves))
    # A "<" inside may end the script, or keep it from ending, whatever JSON says.
    data = json.dumps(chart_data(chart), separators=(",", ":")).replace("<", "\\u003c")
    stages = [(curve, stage) for curve in curves for stage in curve.stages]
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body><h1>{title}</h1>",
        '<p class="hint">Move over a chart to read its values. Drag to zoom, double-click to go back. '
        "Click a name in the legend to hide its line.</p>",
        '<noscript><p>The charts need JavaScript; the tables do not.</p></noscript><div id="charts"></div>',
        f"<h2>Where the runs are</h2>{figures_table(stages)}",
        events_table(stages),
        f"<h2>Main settings</h2>{settings_table(stages)}",
        *(config_details(curve, stage) for curve, stage in stages if stage.config),
        f'<script type="application/json" id="data">{data}</script>',
        f"<script>{SCRIPT.read_text(encoding='utf-8')}</script></body></html>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, "\n".join(parts) + "\n")


def chart_data(chart: Chart) -> dict[str, Any]:
    """A chart as JSON, with numbers of six digits and null for NaN."""
    return {
        "xLabel": chart.x_label,
        "logX": chart.log_x,
        "panels": [
            {
                "yLabel": panel.y_label,
                "logY": panel.log_y,
                "percent": panel.percent,
                "fromZero": panel.from_zero,
                "top": panel.top,
                "lines": [
                    {
                        "label": line.label,
                        "colour": line.colour,
                        "style": line.style,
                        "dashed": line.dashed,
                        "x": _numbers(line.x),
                        "y": _numbers(line.y),
                    }
                    for line in panel.lines
                ],
            }
            for panel in chart.panels
        ],
        "marks": [
            {"x": mark.x, "kind": mark.kind, "text": mark.text, "y": mark.y, "colour": mark.colour}
            for mark in chart.marks
        ],
        "kinds": [
            {"kind": kind, "label": label, "colour": colour}
            for kind, (label, colour) in MARKS.items()
            if any(mark.kind == kind for mark in chart.marks)
        ],
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values.tolist()]


def figures_table(stages: Sequence[tuple[Curve, Stage]]) -> str:
    """What each run has reached."""
    header = (
        *("run", "parameters", "steps", "tokens", "FLOPs", "hours", "loss", "validation loss", "perplexity"),
        *("best validation loss", "tokens/s", "MFU", "setbacks"),
    )
    rows = [(name_of(curve, stage), *figures(stage).values()) for curve, stage in stages]
    return _table(header, rows)


def figures(stage: Stage) -> dict[str, str]:
    """The figures of a run at its end, in words: the last losses, the median throughput."""
    training, evaluations = stage.training, stage.evaluations
    best = np.nanmin(evaluations["val_loss"]) if _any(evaluations["val_loss"]) else math.nan
    setbacks = sum("action" in event for event in stage.events)
    return {
        "parameters": in_short(stage.parameters),
        "steps": f"{stage.last('step'):,.0f}",
        "tokens": in_short(stage.last("tokens")),
        "flops": f"{stage.last('flops'):.3g}",
        "hours": f"{stage.last('seconds') / 3600:.3g}",
        "loss": _told(_last(training["loss"]), "{:.4f}"),
        "val_loss": _told(_last(evaluations["val_loss"]), "{:.4f}"),
        "val_ppl": _told(_last(evaluations["val_ppl"]), "{:.5g}"),
        "best": _told(float(best), "{:.4f}"),
        "tokens_per_s": _told(_median(training["tokens_per_s"]), "{:,.0f}"),
        "mfu": _told(_median(training["mfu"]), "{:.1%}"),
        "setbacks": str(setbacks),
    }


def events_table(stages: Sequence[tuple[Curve, Stage]]) -> str:
    """Growths and setbacks, in order; nothing if there were none."""
    rows = [
        (name_of(curve, stage), str(event["step"]), event["event"], event.get("action", ""), _payload(event))
        for curve, stage in stages
        for event in stage.events
    ]
    return (
        "<h2>What happened</h2>" + _table(("run", "step", "event", "action", "details"), rows, look="events")
        if rows
        else ""
    )


def _payload(event: dict[str, Any]) -> str:
    event = {key: _flat(value) if isinstance(value, dict) else value for key, value in event.items()}
    return ", ".join(
        f"{key} {value}" for key, value in event.items() if key not in ("step", "event", "action")
    )


def settings_table(stages: Sequence[tuple[Curve, Stage]]) -> str:
    """The main keys of the configs, a column for each run; those that differ are marked."""
    rows, differing = [], set()
    for key in MAIN_KEYS:
        values = [_setting(stage.config, key) for _, stage in stages]
        if any(values):
            rows.append((key, *values))
            if len(set(values)) > 1:
                differing.add(key)
    return _table(("key", *(name_of(curve, stage) for curve, stage in stages)), rows, differing)


def config_details(curve: Curve, stage: Stage) -> str:
    """The whole config, folded."""
    text = html.escape(yaml.safe_dump(stage.config, sort_keys=False))
    name = html.escape(f"config of {name_of(curve, stage)} ({stage.folder})")
    return f"<details><summary>{name}</summary><pre>{text}</pre></details>"


def name_of(curve: Curve, stage: Stage) -> str:
    """A run's name among others."""
    return curve.label if len(curve.stages) == 1 else f"{curve.label} / {stage.name}"


def _setting(config: dict[str, Any], key: str) -> str:
    section, name = key.split(".")
    found = config.get(section)
    value = found.get(name) if isinstance(found, dict) else None
    return "" if value is None else str(_flat(value))


def _flat(value: Any) -> Any:
    """A list or mapping in few characters; of a blend, the prefixes."""
    if isinstance(value, dict):
        return ", ".join(f"{part} {size}" for part, size in value.items())
    if isinstance(value, list):
        pairs = [part[1] if isinstance(part, list) and len(part) == 2 else part for part in value]
        return ", ".join(map(str, pairs)) if value and isinstance(value[0], list) else str(value)
    return value


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    marked: set[str] | frozenset[str] = frozenset(),
    look: str = "",
) -> str:
    look = f' class="{look}"' if look else ""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=differs' if row[0] in marked else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table{look}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _any(values: np.ndarray) -> bool:
    return bool((~np.isnan(values)).any())


def _last(values: np.ndarray) -> float:
    return float(values[~np.isnan(values)][-1]) if _any(values) else math.nan


def _median(values: np.ndarray) -> float:
    return float(np.nanmedian(values)) if _any(values) else math.nan


def _told(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"
