"""What runs have left to be drawn: their rows as columns of numbers, their events and configs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from megatron_tokenformer.config.load import read_yaml, validate
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import METRICS, iterate_rows

TRAINING = ("step", "tokens", "flops", "loss", "lr", "grad_norm", "step_time_s", "tokens_per_s", "mfu")
EVALUATION = ("step", "tokens", "flops", "val_loss", "val_ppl")
Columns = dict[str, np.ndarray]
"""float64 columns of one length each; NaN where a row has null or nothing"""


@dataclass(frozen=True)
class Stage:
    """One run: by itself, or as a stage of a schedule."""

    name: str
    folder: Path
    training: Columns
    """TRAINING of the logged steps, and `seconds` of training since the run began"""
    evaluations: Columns
    """EVALUATION of each, and `seconds`"""
    events: list[dict[str, Any]]
    """growths and setbacks, as in metrics.jsonl"""
    config: dict[str, Any]
    """as resolved; empty if there is none (any more)"""

    @property
    def parameters(self) -> int | None:
        """Of its model, if the config is there and is one that this version reads."""
        if not self.config.get("model"):
            return None
        try:
            return parameter_count(validate(RunConfig, self.config, "config.yaml").model)
        except UserError:
            return None

    def last(self, name: str) -> float:
        """The largest value of a column that only grows, such as `step`; 0 without rows."""
        ends = [c[name][-1] for c in (self.training, self.evaluations) if len(c[name])]
        return float(np.nanmax(ends)) if ends and not np.all(np.isnan(ends)) else 0.0

    def first(self, name: str) -> float:
        """Likewise the smallest."""
        begins = [c[name][0] for c in (self.training, self.evaluations) if len(c[name])]
        return float(np.nanmin(begins)) if begins and not np.all(np.isnan(begins)) else 0.0


@dataclass(frozen=True)
class Curve:
    """A run, or a schedule: its stages, each grown from the one before."""

    label: str
    stages: list[Stage]

    def before(self, index: int, name: str) -> float:
        """Where stage `index` begins on an axis: `step` and `seconds` start again in each, others do not."""
        if name not in ("step", "seconds"):
            return 0.0
        return sum(stage.last(name) for stage in self.stages[:index])


def read_curves(folders: Sequence[str | Path], labels: Sequence[str] = ()) -> list[Curve]:
    """The runs and schedules in these folders, in their order.

    Args:
        labels: names for them; by default those of the folders.

    Raises:
        UserError: a folder is neither; or not as many labels as folders.
    """
    if labels and len(labels) != len(folders):
        raise UserError(f"--label is given {len(labels)} times for {len(folders)} folders; give one for each")
    paths = [Path(folder) for folder in folders]
    names = list(labels) or _different_names(paths)
    return [Curve(name, _stages(path)) for name, path in zip(names, paths)]


def _stages(folder: Path) -> list[Stage]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of a run")
    if (folder / METRICS).exists():
        return [read_stage(folder)]
    found = [path.parent for path in folder.glob(f"*/{METRICS}")]
    stages = [
        stage
        for stage in map(read_stage, found)
        if len(stage.training["step"]) + len(stage.evaluations["step"])
    ]
    if not stages:
        raise UserError(f"{folder} has no {METRICS}, nor stages that have one; give the folder of a run")
    stages.sort(key=lambda stage: (stage.first("tokens"), stage.last("tokens")))
    for before, after in pairwise(stages):
        # Tokens are counted over all stages, so that each begins where the one before has ended.
        if after.first("tokens") < before.last("tokens"):
            raise UserError(
                f"{before.folder} and {after.folder} are no stages of one schedule; name the runs themselves"
                f", such as {folder}/*"
            )
    return stages


def read_stage(folder: Path) -> Stage:
    """Read what a run has left, in one pass over its rows.

    Raises:
        UserError: metrics.jsonl cannot be read.
    """
    path = folder / METRICS
    training = {name: array("d") for name in TRAINING}
    evaluations = {name: array("d") for name in EVALUATION}
    events: list[dict[str, Any]] = []
    damaged = 0
    try:
        size, done = path.stat().st_size, 0
        with tqdm(total=size, unit="B", unit_scale=True, desc=str(path), disable=None, leave=False) as bar:
            for count, (row, end) in enumerate(iterate_rows(path)):
                if row is None or not _is_sound(row):
                    damaged += 1
                elif "event" in row:
                    events.append(row)
                elif "loss" in row:
                    _append(training, row)
                elif "val_loss" in row:
                    _append(evaluations, row)
                if count % 10_000 == 0:
                    bar.update(end - done)
                    done = end
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", exit_code=1) from None
    if damaged:
        print(f"warning: {damaged} damaged line{'s' if damaged > 1 else ''} of {path} left out", flush=True)
    return Stage(
        folder.resolve().name, folder, *_with_seconds(training, evaluations), events, _config(folder)
    )


def _is_sound(row: dict[str, Any]) -> bool:
    """Whether a row has a step, and what it says of an event, if it does, is in words."""
    words = (row.get("event", ""), row.get("action", ""))
    return isinstance(row.get("step"), int) and all(isinstance(word, str) for word in words)


def _append(columns: dict[str, array[float]], row: dict[str, Any]) -> None:
    for name, column in columns.items():
        value = row.get(name)
        column.append(value if isinstance(value, (int, float)) else np.nan)


def _with_seconds(
    training: dict[str, array[float]], evaluations: dict[str, array[float]]
) -> tuple[Columns, Columns]:
    """Add the seconds of training: a row's step time is a mean over the steps since the row before."""
    trained = {name: np.array(column) for name, column in training.items()}
    evaluated = {name: np.array(column) for name, column in evaluations.items()}
    steps = np.diff(trained["step"], prepend=0.0)
    trained["seconds"] = np.cumsum(np.nan_to_num(steps * trained["step_time_s"]))
    evaluated["seconds"] = (
        np.interp(evaluated["step"], [0.0, *trained["step"]], [0.0, *trained["seconds"]])
        if len(trained["step"])
        else np.zeros_like(evaluated["step"])
    )
    return trained, evaluated


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_yaml(folder / "config.yaml")
    except (UserError, yaml.YAMLError):
        return {}


def _different_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part[-1:])} {number}" for number, part in enumerate(parts, start=1)]
