"""A schedule over two hosts, of which one is lost in every stage, ends as one that nobody disturbed.

The host's cable is cut, or all of its processes are killed at once, at a step drawn from a seed; then the
host is there again, and the same command is called.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from tests.cluster.conftest import rows
from tests.cluster.hosts import Hosts
from tests.faults.schedule import SCHEDULE, STAGES, overrides, results
from tests.toy import write_tokens

HOW = ("cable", "processes")
SEED = int(os.environ.get("FAULT_SEED", "0"))
STEPS = 96
MINUTE = 60.0
PROGRAM = "megatron_tokenformer.training.pretrain"


class Schedule:
    """The demo's schedule, smaller, started on a login host for n1 and n2."""

    def __init__(self, hosts: Hosts, folder: Path, prefix: str) -> None:
        self.hosts, self.folder, self.log = hosts, folder, folder.with_suffix(".log")
        hostfile, variables = folder.with_suffix(".hosts"), folder.with_suffix(".variables")
        hostfile.write_text("n1 slots=1\nn2 slots=1\n")
        variables.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")  # pdsh passes on no others of ours
        launch = {"hostfile": hostfile, "nodes": 2, "processes_per_node": 1}
        changes: dict[str, Any] = {f"launch.{key}": value for key, value in launch.items()}
        changes["common.training.steps"] = STEPS
        machine = ["python", "-m", "megatron_tokenformer.progressive", "--config", SCHEDULE]
        self._words = [*machine, "--launcher", "deepspeed", *overrides(folder, prefix, **changes)]
        self._variables = {"DS_ENV_FILE": variables}

    def to_its_end(self) -> None:
        """Call the command; it must reach the end."""
        self.hosts.run("login", *self._words, seconds=10 * MINUTE, **self._variables)

    def lose(self, how: str, stage: str, step: int) -> None:
        """Call the command, lose n2 when a stage is at a step, and see all end."""
        machine = self.hosts.start("login", *self._words, log=self.log, **self._variables)

        def is_there() -> bool:
            assert machine.poll() is None, self._said()
            return any(row["step"] >= step for row in rows(self.folder / stage))

        self._wait(is_there, 5 * MINUTE)
        try:
            if how == "cable":
                self.hosts.unplug("n2")
            else:
                self.hosts.clear(PROGRAM, "n2")
            assert machine.wait(10 * MINUTE) == 1, self._said()
            self._wait(lambda: not self.hosts.find("n1", f"-m {PROGRAM}"), MINUTE)
            self._wait(lambda: not self.hosts.find("n2", f"-m {PROGRAM}"), MINUTE)
        finally:
            self.hosts.plug("n2")
        assert rows(self.folder / stage)[-1]["step"] < STEPS, "it was lost too late"

    def _wait(self, there: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < deadline, self._said()
            time.sleep(0.05)

    def _said(self) -> str:
        return self.log.read_text(errors="replace")[-5000:]


def test_a_schedule_that_loses_a_host_in_every_stage_ends_with_the_same_numbers(
    hosts: Hosts, tmp_path: Path
) -> None:
    prefix = write_tokens(tmp_path, tokens=200_000)
    straight, disturbed = (Schedule(hosts, tmp_path / name, prefix) for name in ("straight", "disturbed"))
    straight.to_its_end()
    drawn = random.Random(SEED)
    for stage, how in zip(STAGES, cycle(HOW)):
        disturbed.lose(how, stage, drawn.randint(1, STEPS // 2))
    disturbed.to_its_end()
    assert results(disturbed.folder) == results(straight.folder)
