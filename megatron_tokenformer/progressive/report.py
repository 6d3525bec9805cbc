"""What the stages came to: a table for the terminal and RUN_DIR/report.md, from journal and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.evaluation.charts import scaling_chart
from megatron_tokenformer.evaluation.curves import Curve, read_stage
from megatron_tokenformer.evaluation.picture import can_draw, draw
from megatron_tokenformer.metrics_file import METRICS, read_rows
from megatron_tokenformer.progressive.journal import Journal
from megatron_tokenformer.progressive.plan import Plan, Stage

REPORT = "report.md"
PLOT = "loss_vs_flops.png"
HEADER = (
    "stage",
    "layout",
    "parameters",
    "tokens per layer",
    "loss before growth",
    "after growth",
    "at the end",
    "trained tokens",
    "FLOPs",
    "seconds",
)


@dataclass(frozen=True)
class StageResult:
    """One line of the report.  Losses are validation losses in nats per token; None: not known (yet)."""

    name: str
    layout: str
    parameters: int
    tokens: tuple[int, ...]
    """of each of query, key and value; of the output projection; of the feed-forward part; () if dense"""
    before: float | None
    after: float | None
    end: float | None
    trained_tokens: int | None
    """over this stage and those before"""
    flops: float | None
    """likewise, of training alone"""
    seconds: float
    comparable: bool
    """whether the losses before and after growth are of the same batches"""

    @property
    def change(self) -> float | None:
        """Relative change of the loss at the growth that began the stage."""
        if self.before is None or self.after is None or not self.comparable:
            return None
        return abs(self.after - self.before) / self.before


def write_report(plan: Plan, journal: Journal) -> str:
    """Write report.md and the plot into the schedule's folder; return the table for the terminal."""
    text = render(stage_results(plan, journal))
    picture = _picture(plan)
    replace_durably(plan.folder / REPORT, f"# {plan.folder.name}\n\n{text}{picture}")
    return text


def _picture(plan: Plan) -> str:
    """Draw validation loss against training FLOPs; what the report says of it."""
    stages = [read_stage(stage.folder) for stage in plan.stages if (stage.folder / METRICS).exists()]
    chart = scaling_chart([Curve(plan.folder.name, stages)], y="val_loss")
    if not chart.panels:
        return ""
    if not can_draw():
        return "\nNo picture: it needs matplotlib, pip install 'megatron-tokenformer[plots]'.\n"
    draw(chart, plan.folder / PLOT)
    return f"\n![validation loss against training FLOPs]({PLOT})\n"


def stage_results(plan: Plan, journal: Journal) -> list[StageResult]:
    """The results of all stages, done or not."""
    results: list[StageResult] = []
    for index, stage in enumerate(plan.stages):
        train, rows = journal.action(stage.name, "train"), evaluations(stage)
        previous = plan.stages[index - 1] if index else None
        model = stage.config.model
        tokens = () if model.is_dense else tuple(model.tokens.model_dump().values())
        results.append(
            StageResult(
                name=stage.name,
                layout=train.result.get("layout", stage.layout),
                parameters=parameter_count(model),
                tokens=tokens,
                before=results[-1].end if results else None,
                after=next((row["val_loss"] for row in rows if row["step"] == 0), None) if previous else None,
                end=train.result.get("val_loss"),
                trained_tokens=train.result.get("tokens"),
                flops=train.result.get("flops"),
                seconds=train.seconds,
                comparable=previous is not None and _evaluated_on(previous) == _evaluated_on(stage),
            )
        )
    return results


def evaluations(stage: Stage) -> list[dict[str, Any]]:
    """The rows of a stage's metrics that hold a validation loss."""
    path = stage.folder / METRICS
    return [row for row in read_rows(path) if "val_loss" in row] if path.exists() else []


def render(results: list[StageResult]) -> str:
    """A Markdown table that is also straight on a terminal, and what to make of it."""
    rows = [HEADER, *(_cells(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    lines += ["", "Losses are validation losses, in nats per token. Tokens per layer: each of query, key and"]
    lines += ["value / output / feed-forward. Trained tokens and FLOPs add up over the stages.", ""]
    changes = [(result.change, result.name) for result in results if result.change is not None]
    if changes:
        largest, name = max(changes)
        lines.append(f"Largest relative change of the loss at a growth: {largest:.1e} (stage {name}).")
    unlike = [result.name for result in results[1:] if not result.comparable]
    if unlike:
        lines.append(
            f"Evaluated on other batches than the stage before, so not compared: {', '.join(unlike)}."
        )
    return "\n".join(lines) + "\n"


def _cells(result: StageResult) -> tuple[str, ...]:
    def loss(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    return (
        result.name,
        result.layout,
        f"{result.parameters:,}",
        " / ".join(map(str, result.tokens)) or "-",
        loss(result.before),
        loss(result.after),
        loss(result.end),
        "-" if result.trained_tokens is None else f"{result.trained_tokens:,}",
        "-" if result.flops is None else f"{result.flops:.2e}",
        f"{result.seconds:,.0f}" if result.seconds else "-",
    )


def _evaluated_on(stage: Stage) -> tuple[object, ...]:
    data, training = stage.config.data, stage.config.training
    sizes = (training.eval_steps, training.global_batch_size, data.sequence_length)
    return (data.validation, *sizes, training.seed)
