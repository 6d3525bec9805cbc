"""The schema of a progressive schedule: where it runs, and its stages from smallest to largest model."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, PositiveInt, field_validator, model_validator

from megatron_tokenformer.config.growth import Growth
from megatron_tokenformer.config.schema import Section

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OWN_FILES = ("journal.json", "report.md", "loss_vs_flops.png", "lock")


class Slurm(Section):
    """What is asked of SLURM for each stage's job."""

    partition: str | None = None
    """which part of the cluster; by default SLURM's choice"""
    account: str | None = None
    """whom the time is charged to; by default SLURM's choice"""
    time: str | None = None
    """limit of one job, as sbatch reads it ("1-12:00:00"); a job that reaches it ends the call"""
    notice_seconds: PositiveInt = 180
    """so long before its time is up a job is told, to save and go back into the queue"""
    gpus_per_node: int | None = Field(None, ge=0)
    """by default one for each process; 0 asks for none"""
    cpus_per_task: PositiveInt | None = None
    """cores of each process; by default SLURM's choice"""
    extra: list[str] = []
    """further sbatch options, each as written after #SBATCH"""
    setup: list[str] = []
    """shell lines before the training, such as `module load cuda`"""

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_text(cls, value: object) -> object:
        if isinstance(value, int):
            raise ValueError(
                f"YAML reads launch.slurm.time as the number {value}; put it in quotes, '24:00:00'"
            )
        return value


class Launch(Section):
    """Where processes are started, unless a stage says otherwise."""

    processes_per_node: PositiveInt = 1
    """one for each GPU"""
    nodes: PositiveInt = 1
    """hosts that a stage runs on"""
    hostfile: str | None = None
    """for the launcher deepspeed on several nodes: lines of `host slots=N`"""
    slurm: Slurm = Slurm()


class StageConfig(Section):
    """One stage: a run of its own, grown from the stage before."""

    name: str
    """also the name of its folder in run_dir"""
    base: str | None = None
    """a run's config to start from, relative to the schedule's file"""
    config: dict[str, Any] = {}
    """keys of a run's config that are this stage's own"""
    growth: Growth | None = None
    """how it grows from the stage before; by default exactly, by the defaults of these keys"""
    processes_per_node: PositiveInt | None = None
    """by default the schedule's"""
    nodes: PositiveInt | None = None
    """by default the schedule's"""

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, name: str) -> str:
        if not _PLAIN_NAME.fullmatch(name) or name in _OWN_FILES:
            raise ValueError(
                f"stage name '{name}' cannot name a folder here; use letters, digits, '.', '_' and '-', "
                f"and none of {', '.join(_OWN_FILES)}"
            )
        return name


class Schedule(Section):
    """A progressive schedule.  A stage's config is its `base`, then `common`, then its own `config`."""

    run_dir: str
    """folder of the schedule; stage NAME runs in RUN_DIR/NAME"""
    common: dict[str, Any] = {}
    """keys of a run's config that all stages share"""
    launch: Launch = Launch()
    stages: list[StageConfig] = Field(min_length=1)
    """in order, from the smallest model to the largest"""

    @model_validator(mode="after")
    def _stages_differ(self) -> Schedule:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stage name '{twice[0]}' is used twice; each stage needs its own")
        if self.stages[0].growth is not None:
            raise ValueError(
                f"stage '{names[0]}' is the first and grows from nothing; move its growth to a later stage"
            )
        return self
