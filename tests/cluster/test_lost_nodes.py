"""A schedule over two hosts, one of which is lost again and again, ends as one that nobody disturbed.

The host's cable is cut, or all of its processes are killed at once, at moments drawn from a seed after the
first steps of a call; then the host is there again, and the same command is called.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Hosts
from tests.faults.schedule import SCHEDULE, has_stepped, logged_bytes, overrides, results
from tests.toy import write_tokens

HOW = ("cable", "processes")
LOSSES = int(os.environ.get("NODE_LOSSES", "4"))
SEED = int(os.environ.get("FAULT_SEED", "0"))
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
        machine = ["python", "-m", "megatron_tokenformer.progressive", "--config", SCHEDULE]
        # A host that is lost between two stages is waited for at the start of the next.
        changes["common.parallel.join_minutes"] = 1.5
        changes["common.training.steps"] = 96  # so that most of a stage's time is steps
        self._words = [*machine, "--launcher", "deepspeed", *overrides(folder, prefix, **changes)]
        self._variables = {"DS_ENV_FILE": variables}

    def to_its_end(self) -> None:
        """Call the command; it must reach the end."""
        self.hosts.run("login", *self._words, seconds=10 * MINUTE, **self._variables)

    def lose(self, how: str, delay: float) -> bool:
        """Call the command, lose n2 some time after its first step, and see all end.

        Args:
            delay: seconds.

        Returns:
            Whether that ended the call; False if the schedule was done all the same.
        """
        before = logged_bytes(self.folder)
        machine = self.hosts.start("login", *self._words, log=self.log, **self._variables)
        self._wait(machine, lambda: has_stepped(self.folder, before))
        time.sleep(delay)
        # Between two stages there is nothing to kill.
        self._wait(machine, lambda: bool(self.hosts.find("n2", f"-m {PROGRAM}")))
        if machine.poll() is not None:
            assert machine.returncode == 0, self.log.read_text()[-5000:]
            return False
        if how == "cable":
            self.hosts.unplug("n2")
        else:
            self.hosts.clear(PROGRAM, "n2")
        try:
            code = machine.wait(10 * MINUTE)
            assert code in (0, 1), self.log.read_text()[-5000:]
            deadline = time.monotonic() + MINUTE
            while any(self.hosts.find(host, f"-m {PROGRAM}") for host in ("n1", "n2")):
                assert time.monotonic() < deadline, "ranks outlive their peers"
                time.sleep(0.5)
        finally:
            self.hosts.plug("n2")
        return code != 0

    def _wait(self, machine: subprocess.Popen[bytes], there: Callable[[], bool]) -> None:
        """Until something is there, or the call has ended."""
        deadline = time.monotonic() + 5 * MINUTE
        while machine.poll() is None and not there():
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.05)


@pytest.mark.nodes
def test_a_schedule_whose_hosts_are_lost_ends_with_the_same_numbers(
    hosts: Hosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_tokens(tmp_path, tokens=200_000)
    undisturbed = Schedule(hosts, tmp_path / "straight", prefix)
    undisturbed.to_its_end()
    expected, drawn = results(undisturbed.folder), random.Random(SEED)
    lost: list[str] = []
    runs = [Schedule(hosts, tmp_path / "lost-0", prefix)]
    while len(lost) < LOSSES:
        how = HOW[len(lost) % len(HOW)]
        if runs[-1].lose(how, drawn.uniform(0, 2)):
            lost.append(how)
            continue
        # It came to its end before, and is begun anew.
        assert results(runs[-1].folder) == expected
        assert len(runs) <= LOSSES, f"lost in vain but for {lost}"
        runs.append(Schedule(hosts, tmp_path / f"lost-{len(runs)}", prefix))
    runs[-1].to_its_end()
    with capsys.disabled():
        print(f"n2 was lost {len(lost)} times in {len(runs)} runs: {', '.join(lost)}")
    assert results(runs[-1].folder) == expected
