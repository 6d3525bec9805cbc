"""The demo's schedule ends with the same numbers, bit for bit, however often its processes are killed.

KILLS times at least, at moments drawn from a seed, a rank, the launcher or the whole tree dies by kill -9,
and the same command is called again.  Moments are drawn from the start of a call (most of which is start-up),
after its first step, in a growth and in a save, as else nearly all would fall into the start-up.  A schedule
that ends before all kills are done is begun anew; each that ends is compared with one that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.processes import descendants, kill, start
from tests.faults.schedule import SCHEDULE, has_stepped, logged_bytes, overrides, results
from tests.toy import write_tokens

pytestmark = pytest.mark.faults

KILLS = int(os.environ.get("FAULT_KILLS", "30"))
SEED = int(os.environ.get("FAULT_SEED", "0"))
PATIENCE_S = 600.0
"""for anything that must happen; a call takes a minute"""
# Seconds after it that a kill comes, drawn evenly: a start-up takes about ten, a stage's steps about four.
DELAYS = {"start": 12.0, "step": 4.0, "growth": 3.0, "save": 0.0}
MOMENTS = ("start", "step", "step", "growth", "save")
VICTIMS = ("rank", "launcher", "tree")
HIT = {"victim": {*VICTIMS, "growth"}, "phase": {"start", "steps", "growth", "save"}}
"""what must have been killed, and when, before it is enough"""


class Attempt:
    """One call of the command, and what can be seen of how far it is."""

    def __init__(self, folder: Path, prefix: str, **changes: Any) -> None:
        self.folder, self._log = folder, folder.with_suffix(".log")
        self._before = logged_bytes(folder)
        self.process = start(SCHEDULE, overrides(folder, prefix, **changes), self._log)

    def wait_until(self, there: Callable[[], bool], seconds: float = PATIENCE_S) -> bool:
        """Whether it came before the call ended or the time was over."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if there():
                return True
            time.sleep(0.01)
        assert time.monotonic() < deadline or seconds < PATIENCE_S, self.said()
        return False

    def end(self) -> int:
        """Wait for its end, and return its exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None

    def has(self, moment: str) -> bool:
        """Whether this call has come to its first step, or grows, or saves now."""
        return {"start": lambda: True, "step": self._steps, "growth": self._grows, "save": self._saves}[
            moment
        ]()

    def command(self) -> int | None:
        """The process of what the machine executes at the moment, if anything."""
        return next(iter(descendants(self.process.pid)), None)

    def is_past(self, command: int | None) -> bool:
        """Whether that has ended."""
        return self.command() != command

    def phase(self) -> str:
        """What it does at the moment."""
        if self._grows():
            return "growth"
        return "save" if self._saves() else "steps" if self._steps() else "start"

    def said(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]

    def _steps(self) -> bool:
        return has_stepped(self.folder, self._before)

    def _grows(self) -> bool:
        try:
            stages = json.loads((self.folder / "journal.json").read_text())["stages"]
        except FileNotFoundError:
            return False
        return any(actions.get("grow", {}).get("status") == "running" for actions in stages.values())

    def _saves(self) -> bool:
        return any(self.folder.glob("*/checkpoints/.step-*.writing"))


def disturb(attempt: Attempt, drawn: random.Random) -> tuple[str, str] | None:
    """Kill something at a drawn moment; what, and in which phase, or None if the call ended before.

    Returns when what was killed is over.  The call goes on if that had just done its work.
    """
    moment, victim = drawn.choice(MOMENTS), drawn.choice(VICTIMS)
    delay = drawn.uniform(0.0, DELAYS[moment])
    # A call may have no growth before it: then after a while of its steps.
    if not attempt.wait_until(
        lambda: attempt.has(moment), 40.0 if moment in ("growth", "save") else PATIENCE_S
    ):
        if attempt.process.poll() is not None:
            return None
    attempt.wait_until(lambda: False, delay)
    while attempt.process.poll() is None:
        phase, command = attempt.phase(), attempt.command()
        if (killed := kill(attempt.process.pid, victim, drawn)) is not None:
            attempt.wait_until(partial(attempt.is_past, command))
            attempt.wait_until(lambda: False, 1.0)
            return killed, phase
        time.sleep(0.02)
    return None


def enough(kills: Counter[tuple[str, str]]) -> bool:
    """Whether there were so many, of every kind; moments are drawn, so it can take some more."""
    hit = {"victim": {victim for victim, _ in kills}, "phase": {phase for _, phase in kills}}
    missing = {kind: wanted - hit[kind] for kind, wanted in HIT.items() if wanted - hit[kind]}
    assert kills.total() < 3 * max(KILLS, 30), f"after {kills.total()} kills none of {missing}"
    return kills.total() >= KILLS and not missing


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The data, and what the schedule comes to if nobody disturbs it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prefix = write_tokens(folder, tokens=200_000)
    attempt = Attempt(folder / "run", prefix)
    assert attempt.end() == 0, attempt.said()
    return prefix, results(folder / "run")


def test_a_schedule_that_is_asked_to_leave_ends_as_one_that_was_not(
    undisturbed: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    prefix, expected = undisturbed
    asked = Attempt(tmp_path / "run", prefix, **{"common.training.max_minutes": 0.001})
    assert asked.end() == 85, asked.said()
    assert "error: stage 'tokens-32' (train) left at step 1 for training.max_minutes" in asked.said()
    asked = Attempt(tmp_path / "run", prefix)
    assert asked.wait_until(lambda: asked.has("step"))
    asked.process.terminate()
    assert asked.end() == 85, asked.said()
    stages = json.loads((tmp_path / "run/journal.json").read_text())["stages"]
    assert stages["tokens-32"]["train"]["status"] == "interrupted"
    again = Attempt(tmp_path / "run", prefix)
    assert again.end() == 0, again.said()
    assert results(tmp_path / "run") == expected


def test_thirty_kills_change_nothing(
    undisturbed: tuple[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, expected = undisturbed
    drawn = random.Random(SEED)
    kills: Counter[tuple[str, str]] = Counter()
    codes: Counter[int] = Counter()
    run = 0
    while not enough(kills):
        folder, run = tmp_path / f"run-{run}", run + 1
        code = -1
        while code != 0:
            attempt, hit = Attempt(folder, prefix), False
            while not enough(kills) and (killed := disturb(attempt, drawn)) is not None:
                kills[killed] += 1
                hit = True
                with capsys.disabled():
                    print(f"kill {kills.total()}: {killed[0]} in {killed[1]}", flush=True)
            code = attempt.end()
            codes[code] += 1
            assert code in ((0, 1, 85, -9) if hit else (0,)), attempt.said()
        assert results(folder) == expected
    with capsys.disabled():
        print(
            f"{kills.total()} kills over {run} runs of the schedule: {dict(kills)}; exit codes {dict(codes)}"
        )
