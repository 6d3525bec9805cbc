"""What the journal says against what is there and what the schedule says now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import FINISHED, INTERRUPTED
from megatron_tokenformer.progressive.journal import Journal, Step
from megatron_tokenformer.progressive.plan import Plan, Stage

# Changing these changes how a stage is trained and not what comes out of it, or answers a setback.
FREE_SETTINGS = (
    "run_dir",
    "parallel.",
    "logging.",
    "checkpoint.interval",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "checkpoint.asynchronous",
    "checkpoint.max_failures",
    "checkpoint.check_loss",
    "checkpoint.verify",
    "data.tokenizer.",
    "evaluation.",
    "training.compile",
    "training.micro_batch_size",
    "training.recompute",
    "training.eval_interval",
    "training.log_interval",
    "training.max_minutes",
    "training.max_rollbacks",
    "training.max_skipped_steps",
    "training.on_",
    "training.slow_timeout_minutes",
    "training.spike_",
    "training.step_timeout_minutes",
    "training.straggler_factor",
)


def train_settings(stage: Stage) -> dict[str, Any]:
    """What decides the result of a stage's training, by dotted key."""
    settings = _flat(stage.config.model_dump(mode="json"))
    if stage.previous:
        del settings["checkpoint.load"]  # the stage's own folder, under any name
    return {key: value for key, value in settings.items() if not key.startswith(FREE_SETTINGS)}


def grow_settings(stage: Stage) -> dict[str, Any]:
    """What decides the result of a stage's growth, by dotted key."""
    growth = {"growth": stage.growth.model_dump(mode="json"), "model": stage.config.model.model_dump()}
    return {"grown from": stage.previous, **_flat(growth), "training.seed": stage.config.training.seed}


def finished_record(folder: Path, steps: int) -> dict[str, Any] | None:
    """What a run wrote when it had all its steps; None if it has not."""
    record = _read(folder / FINISHED)
    return record if record.get("step") == steps else None


def interruption_record(folder: Path) -> dict[str, Any] | None:
    """What a run wrote when it was asked to leave and had saved; None if it was not, or is at work again."""
    return _read(folder / INTERRUPTED) or None


def forget_interruption(folder: Path) -> None:
    """So that a record that is there after the next start is of that start."""
    (folder / INTERRUPTED).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def reconcile(plan: Plan, journal: Journal) -> None:
    """Bring the journal up to date with the folders, and refuse a plan that contradicts what is done.

    Raises:
        UserError: a done stage has other settings now, or its source is gone, or a folder is not ours.
    """
    for stage in plan.stages:
        if stage.name in journal.stages and not stage.folder.exists():
            journal.forget(stage.name)
        _harvest(stage, journal)
    for stage in plan.stages:
        _check_known(stage, journal)
        _check_source(stage, journal)
        _check_unchanged(plan, stage, journal)


def _harvest(stage: Stage, journal: Journal) -> None:
    """A run may have finished after its machine was killed."""
    action = journal.action(stage.name, "train")
    if action.status in ("pending", "done"):
        return
    record = finished_record(stage.folder, action.settings.get("training.steps", 0))
    if record is not None:
        journal.end(stage.name, "train", "done", {**record, "layout": stage.layout})


def _check_known(stage: Stage, journal: Journal) -> None:
    known = journal.action(stage.name, "train").status != "pending"
    if not known and ((stage.folder / FINISHED).exists() or (stage.folder / "checkpoints").exists()):
        raise UserError(
            f"{stage.folder} holds a run that {journal.path} does not know; "
            f"move it away, or choose another run_dir"
        )


def _check_source(stage: Stage, journal: Journal) -> None:
    steps: tuple[Step, ...] = ("grow", "train")
    begun = any(journal.action(stage.name, step).status != "pending" for step in steps)
    if stage.previous and begun and journal.action(stage.previous, "train").status != "done":
        raise UserError(
            f"stage '{stage.name}' is begun, but '{stage.previous}', which it grows from, is not done (any "
            f"more); delete {stage.folder} to do it again"
        )


def _check_unchanged(plan: Plan, stage: Stage, journal: Journal) -> None:
    grow, train = journal.action(stage.name, "grow"), journal.action(stage.name, "train")
    changes: list[str] = []
    if train.status != "pending":
        changes += _changes(grow.settings, grow_settings(stage))
    if train.status == "done":
        changes += _changes(train.settings, train_settings(stage))
    if not changes:
        return
    later = plan.stages[plan.stages.index(stage) :]
    folders = " ".join(str(each.folder) for each in later if each.name in journal.stages)
    state = "done" if train.status == "done" else "grown and begun"
    raise UserError(
        f"stage '{stage.name}' is {state} with other settings than the schedule has now: "
        f"{'; '.join(dict.fromkeys(changes))}. Put them back, or choose another run_dir, or to do it again "
        f"delete {folders}"
    )


def _changes(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys in both whose values differ; a key that only one version of the software has is none."""
    shared = [key for key in recorded if key in now]
    return [f"{key} was {recorded[key]}, is {now[key]}" for key in shared if recorded[key] != now[key]]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
