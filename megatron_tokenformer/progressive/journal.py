"""The journal of a schedule: what each stage has done, in RUN_DIR/journal.json, replaced atomically."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.errors import UserError

JOURNAL = "journal.json"
FORMAT_VERSION = 1

Step = Literal["grow", "train"]
Status = Literal["pending", "running", "done", "failed", "interrupted"]


@dataclass
class Action:
    """One of a stage's two actions.  `running` in a journal that nobody writes: it was killed."""

    status: Status = "pending"
    started: str | None = None
    """first start, UTC"""
    ended: str | None = None
    seconds: float = 0.0
    """wall-clock time, over all attempts; waiting in a job queue included"""
    settings: dict[str, Any] = field(default_factory=dict)
    """what it was done with: dotted keys"""
    result: dict[str, Any] = field(default_factory=dict)


@dataclass
class Journal:
    """The actions of all stages by stage name; every change is on disk before anything follows it."""

    path: Path
    stages: dict[str, dict[Step, Action]] = field(default_factory=dict)

    def action(self, stage: str, step: Step) -> Action:
        """The record of an action; a pending one if it was never begun."""
        return self.stages.get(stage, {}).get(step, Action())

    def begin(self, stage: str, step: Step, settings: dict[str, Any]) -> None:
        """An action starts, or starts again."""
        action = self.stages.setdefault(stage, {}).setdefault(step, Action())
        action.status, action.ended, action.settings = "running", None, settings
        action.started = action.started or _now()
        self.write()

    def end(self, stage: str, step: Step, status: Status, result: dict[str, Any] | None = None) -> None:
        """An action that was begun has ended."""
        action = self.stages[stage][step]
        action.status, action.ended, action.result = status, _now(), result or {}
        self.write()

    def add_seconds(self, stage: str, step: Step, seconds: float) -> None:
        """Time has passed in an action that is running; it is not worth ending that if it cannot be noted."""
        self.stages[stage][step].seconds += seconds
        with contextlib.suppress(OSError):
            self.write()

    def forget(self, stage: str) -> None:
        """Drop what is known of a stage."""
        self.stages.pop(stage, None)
        self.write()

    def write(self) -> None:
        """Put the journal on disk; a kill leaves the old one or the new."""
        stages = {
            stage: {step: asdict(action) for step, action in actions.items()}
            for stage, actions in self.stages.items()
        }
        text = json.dumps({"format_version": FORMAT_VERSION, "stages": stages}, indent=1)
        replace_durably(self.path, text + "\n")


def read_journal(folder: Path) -> Journal:
    """The journal of a schedule's folder; an empty one if there is none yet.

    Raises:
        UserError: a file that is not a journal, or of a later version.
    """
    path = folder / JOURNAL
    if not path.exists():
        return Journal(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path} is of format version {tree['format_version']}, not {FORMAT_VERSION}")
        stages = {
            stage: {step: Action(**action) for step, action in actions.items()}
            for stage, actions in tree["stages"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a journal ({error}); put it back, or move the folder away to start anew"
        ) from None
    return Journal(path, stages)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
