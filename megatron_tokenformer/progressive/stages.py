"""The stage machine: for each stage, grow the last stage's result and train it, skipping what is done."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.config.load import dump_config
from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.errors import TO_BE_CONTINUED, UserError
from megatron_tokenformer.progressive.execute import Asked, execute
from megatron_tokenformer.progressive.guard import SIGNALS
from megatron_tokenformer.progressive.journal import Journal, Step
from megatron_tokenformer.progressive.launchers import Command, Launcher
from megatron_tokenformer.progressive.plan import Plan, Stage
from megatron_tokenformer.progressive.reconcile import (
    finished_record,
    forget_interruption,
    grow_settings,
    interruption_record,
    reconcile,
    train_settings,
)

Grower = Callable[[Stage, Path], Command]
ENDED_BY_A_REQUEST = (0, *(128 + number for number in SIGNALS))


class AskedToLeave(UserError):
    """Nothing is lost: somebody asked this process, or the run that it had started, to leave.

    Args:
        by: signals that this process was asked by; none if it was the run alone.
    """

    def __init__(self, message: str, by: Sequence[int] = ()) -> None:
        # Ctrl-C ends things as in a shell; a scheduler that asks is told to start the call again.
        code = 128 + signal.SIGINT if signal.SIGINT in by else TO_BE_CONTINUED
        super().__init__(f"{message}; the same call goes on from there", code)
        self.by = tuple(by)


class RunFailed(UserError):
    """A stage's command failed; the same call goes on from its last checkpoint.

    Args:
        progressed: a checkpoint came since it was started, so that trying again may bring it further.
        by: signals that this process was asked by.
    """

    def __init__(self, message: str, progressed: bool = False, by: Sequence[int] = ()) -> None:
        super().__init__(message, exit_code=1)
        self.progressed, self.by = progressed, tuple(by)


@dataclass(frozen=True)
class Machine:
    """A plan, how its commands are made, and what is done of it."""

    plan: Plan
    launcher: Launcher
    grower: Grower
    journal: Journal
    lock: int
    """descriptor of the folder's lock, kept open by every command"""
    asked: Asked
    """what this process was told"""
    only: str | None = None
    """the one stage to bring to its end; None for all"""


def run_stages(machine: Machine) -> None:
    """Bring every stage to its end, going on where an earlier call stopped.

    A stage is done when its run left its record of being finished, whatever the launcher's exit code says.

    Raises:
        UserError: a command failed, a signal came, what is done was done with other settings, or the one
            stage to do comes after one that is not done.
    """
    reconcile(machine.plan, machine.journal)
    todo = pending(machine.plan, machine.journal)
    if machine.only is not None:
        todo = _of_one_stage(todo, machine.only)
    if not todo:
        print(f"== {f'stage {machine.only}' if machine.only else 'every stage'}: done", flush=True)
    for stage in machine.plan.stages:
        if any(stage is waiting for waiting, _ in todo):
            stage.folder.mkdir(parents=True, exist_ok=True)
            replace_durably(stage.run_file, dump_config(stage.config))
    for stage, step in todo:
        if by := machine.asked.numbers:
            raise AskedToLeave(f"{_named(by)} before stage '{stage.name}' ({step})", by)
        print(f"== stage {stage.name}: {step} ({stage.layout})", flush=True)
        if step == "grow":
            _grow(machine, stage)
        else:
            _train(machine, stage)


def pending(plan: Plan, journal: Journal) -> list[tuple[Stage, Step]]:
    """What is left to do, in order."""
    todo: list[tuple[Stage, Step]] = []
    for stage in plan.stages:
        if journal.action(stage.name, "train").status == "done":
            continue
        grow = journal.action(stage.name, "grow")
        if stage.previous and (grow.status != "done" or grow.settings != grow_settings(stage)):
            todo.append((stage, "grow"))
        todo.append((stage, "train"))
    return todo


def _of_one_stage(todo: list[tuple[Stage, Step]], name: str) -> list[tuple[Stage, Step]]:
    mine = [(stage, step) for stage, step in todo if stage.name == name]
    if mine and mine[0] != todo[0]:
        raise UserError(f"stage '{name}' comes after '{todo[0][0].name}', which is not done", exit_code=1)
    return mine


def dry_run(plan: Plan, journal: Journal, launcher: Launcher, grower: Grower) -> str:
    """The commands that are left, and the files that they would read; nothing is written or started."""
    lines = []
    for stage, step in pending(plan, journal):
        command = grower(stage, _source(stage, journal)) if step == "grow" else launcher(stage, plan.launch)
        lines += [f"# stage {stage.name}: {step} ({stage.layout})", str(command)]
        for path, text in command.files.items():
            lines += [f"# {path}:", text.rstrip()]
    return "\n".join(lines) or "# every stage is done"


def _grow(machine: Machine, stage: Stage) -> None:
    command = machine.grower(stage, _source(stage, machine.journal))
    code = _perform(machine, stage, "grow", grow_settings(stage), command)
    checkpoint = _newest(stage.grown)
    if checkpoint is None:
        code = code or 1
    by = machine.asked.numbers
    if code and by:
        machine.journal.end(stage.name, "grow", "interrupted")
        raise AskedToLeave(f"{_named(by)} in stage '{stage.name}' (grow)", by)
    if code:
        machine.journal.end(stage.name, "grow", "failed")
        raise RunFailed(_words(stage, "grow", command, f"ended with exit code {code}"))
    machine.journal.end(stage.name, "grow", "done", {"checkpoint": str(checkpoint)})


def _train(machine: Machine, stage: Stage) -> None:
    command = machine.launcher(stage, machine.plan.launch)
    forget_interruption(stage.folder)
    before = _newest(stage.folder)
    code = _perform(machine, stage, "train", train_settings(stage), command)
    record = _await_record(stage, command.settle_seconds if code == 0 else 0.0)
    if record is not None:
        machine.journal.end(stage.name, "train", "done", {**record, "layout": stage.layout})
        return
    by = machine.asked.numbers
    if how := _how_it_left(stage, code, by):
        machine.journal.end(stage.name, "train", "interrupted")
        raise AskedToLeave(how, by)
    machine.journal.end(stage.name, "train", "failed")
    early = "ended early (exit code 0, but the run is not finished)"
    why = f"ended with exit code {code}" if code else early
    told = f", asked to leave by {_named(by)}, and did not say that it has saved" if by else ""
    progressed = _newest(stage.folder) != before
    raise RunFailed(_words(stage, "train", command, f"{why}{told}"), progressed, by)


def _how_it_left(stage: Stage, code: int, by: Sequence[int]) -> str | None:
    """How a run left that was asked to, in words; None if it failed.

    torchrun makes 1 of every exit code: the record tells.  A run that a signal ended before it could take
    requests had done nothing yet.
    """
    where, record = f"stage '{stage.name}' (train)", interruption_record(stage.folder)
    told = f"{_named(by)} in {where}, which" if by else where
    if record is not None:
        return f"{told} left at step {record.get('step')} for {record.get('reason')}"
    if code == TO_BE_CONTINUED:
        return f"{told} left as it was asked to"
    return f"{_named(by)} in {where}" if by and code in ENDED_BY_A_REQUEST else None


def _named(numbers: Sequence[int]) -> str:
    return ", then ".join(dict.fromkeys(signal.Signals(number).name for number in numbers))


def _await_record(stage: Stage, patience: float) -> dict[str, Any] | None:
    deadline = time.monotonic() + patience
    while True:
        record = finished_record(stage.folder, stage.config.training.steps)
        over = time.monotonic() >= deadline or interruption_record(stage.folder) is not None
        if record is not None or over:
            return record
        time.sleep(1.0)


def _perform(machine: Machine, stage: Stage, step: Step, settings: dict[str, Any], command: Command) -> int:
    """Execute a step's command, which is noted in the journal, and return its exit code."""
    journal = machine.journal
    journal.begin(stage.name, step, settings)

    def tick(seconds: float) -> None:
        journal.add_seconds(stage.name, step, seconds)

    try:
        return execute(command, machine.lock, tick, machine.asked)
    except UserError:
        journal.end(stage.name, step, "failed")
        raise


def _words(stage: Stage, step: Step, command: Command, why: str) -> str:
    return (
        f"stage '{stage.name}' ({step}) {why}: {command}; its messages are above (of a SLURM job: in "
        f"{stage.folder}/job-*.log); the same call goes on from there"
    )


def _newest(folder: Path) -> Path | None:
    try:
        return find_checkpoint(folder)
    except UserError:
        return None


def _source(stage: Stage, journal: Journal) -> Path:
    """The last checkpoint of the stage before, by its name: if it is damaged, no older one will do."""
    assert stage.previous is not None
    folder = stage.folder.parent / stage.previous / "checkpoints"
    checkpoint = journal.action(stage.previous, "train").result.get("checkpoint")
    return folder / Path(checkpoint).name if checkpoint else folder
