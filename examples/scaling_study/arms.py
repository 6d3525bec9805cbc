"""What a scaling study is: its arms, each a schedule for the stage machine, and the runs of all seeds."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveInt, model_validator

from megatron_tokenformer.config.load import merge, parse_override, read_yaml, validate
from megatron_tokenformer.config.schema import RunConfig, Section
from megatron_tokenformer.config.sizes import step_flops, tokens_per_step
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import FINISHED, METRICS, read_rows
from megatron_tokenformer.progressive.plan import Plan, load_plan
from megatron_tokenformer.progressive.schema import Launch


class Arm(Section):
    """One way to spend the tokens."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str
    budget_of: str | None = None
    """another arm, of which this is a shorter run; any other arm sees as many tokens as the reference"""
    common: dict[str, Any] = {}
    """keys of a run's config that the stages of this arm share"""
    stages: list[dict[str, Any]] = Field(min_length=1)
    """as in a schedule; a `base` is relative to the study's file"""


class Study(Section):
    """A scaling study."""

    run_dir: str
    """run SEED of arm NAME is in RUN_DIR/seed-SEED/NAME"""
    seeds: list[int] = Field(min_length=1)
    subject: str
    """the arm whose final loss the others are measured by"""
    reference: str
    """the arm whose FLOPs to that loss are compared"""
    common: dict[str, Any] = {}
    """keys of a run's config that all arms share"""
    launch: Launch = Launch()
    jobs: PositiveInt = 2
    """runs at once"""
    arms: list[Arm] = Field(min_length=1)

    @model_validator(mode="after")
    def _arms_are_there(self) -> Study:
        names = [arm.name for arm in self.arms]
        told = {"subject": self.subject, "reference": self.reference}
        told |= {f"budget_of of {arm.name}": arm.budget_of for arm in self.arms if arm.budget_of}
        for key, name in told.items():
            if name not in names:
                raise ValueError(f"{key} is {name}, which is none of the arms {', '.join(names)}")
        if len(set(names)) < len(names):
            raise ValueError(f"two arms have one name: {', '.join(names)}")
        return self


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: Arm
    seed: int
    plan: Plan
    schedule: Path
    """the file that the stage machine gets"""

    @property
    def done(self) -> bool:
        """Whether its last stage is."""
        return (self.plan.stages[-1].folder / FINISHED).exists()

    @property
    def largest(self) -> RunConfig:
        """The config of the last stage."""
        return self.plan.stages[-1].config

    @property
    def tokens(self) -> int:
        """That it sees, over all stages."""
        return sum(s.config.training.steps * tokens_per_step(s.config) for s in self.plan.stages)

    @property
    def flops(self) -> int:
        """That it takes, over all stages."""
        return sum(stage.config.training.steps * step_flops(stage.config) for stage in self.plan.stages)

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """What has been logged so far, with the number of the stage; tokens and FLOPs are over all stages."""
        for number, stage in enumerate(self.plan.stages):
            if (stage.folder / METRICS).exists():
                yield from ((number, row) for row in read_rows(stage.folder / METRICS))


def load_study(path: Path, overrides: list[str]) -> Study:
    """The study that a YAML file and `key=value` overrides describe.

    Raises:
        UserError: a key is unknown, or an arm that is named is not there.
    """
    tree = read_yaml(path)
    for text in overrides:
        merge(tree, parse_override(text))
    return validate(Study, tree, str(path))


def plan_runs(study: Study, path: Path) -> list[Run]:
    """All runs, seed by seed, with their schedules written.

    Args:
        path: the study's file.

    Raises:
        UserError: a schedule cannot work, or the arms do not see the same data.
    """
    runs = [_plan(study, arm, seed, path) for seed in study.seeds for arm in study.arms]
    reference = next(run for run in runs if run.arm.name == study.reference)
    for run in runs:
        told, expected = _reading(run), _reading(reference)
        if run.arm.budget_of is None and run.tokens != reference.tokens:
            raise UserError(
                f"arm {run.arm.name} sees {run.tokens:,} tokens and {study.reference} {reference.tokens:,}; "
                f"make them equal, or say which arm it is a budget_of"
            )
        if told != [expected[0]] * len(told):
            raise UserError(
                f"stages of {run.arm.name} read other data, or in other batches, than {study.reference}"
            )
    return runs


def _reading(run: Run) -> list[tuple[object, ...]]:
    """What decides which samples a step sees, and which an evaluation does, for each stage."""
    return [
        (s.config.data, s.config.training.global_batch_size, s.config.training.eval_steps)
        for s in run.plan.stages
    ]


def _plan(study: Study, arm: Arm, seed: int, path: Path) -> Run:
    folder = Path(study.run_dir) / f"seed-{seed}" / arm.name
    common = merge(deepcopy(study.common), deepcopy(arm.common))
    tree = {
        "run_dir": str(folder),
        "launch": study.launch.model_dump(),
        "common": merge(common, {"training": {"seed": seed}}),
        "stages": [_with_base(stage, path.parent) for stage in arm.stages],
    }
    text = yaml.safe_dump(tree, sort_keys=False)
    schedule = folder.with_name(f"{arm.name}.yaml")
    if not schedule.exists() or schedule.read_text(encoding="utf-8") != text:
        schedule.parent.mkdir(parents=True, exist_ok=True)
        schedule.write_text(text, encoding="utf-8")
    return Run(arm, seed, load_plan(schedule), schedule)


def _with_base(stage: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {**stage, "base": str((folder / stage["base"]).absolute())} if "base" in stage else stage
