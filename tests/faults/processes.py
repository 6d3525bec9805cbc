"""A stage machine's processes, and ways for some of them to die."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAINER = "megatron_tokenformer.training.pretrain"


def start(schedule: Path, overrides: list[str], output: Path) -> subprocess.Popen[bytes]:
    """The command that begins and continues a schedule; what it says is added to `output`."""
    command = [sys.executable, "-m", "megatron_tokenformer.progressive", "--config", str(schedule)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with open(output, "ab") as file:
        return subprocess.Popen(
            [*command, "--launcher", "local", *overrides],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def descendants(process: int) -> list[int]:
    """The living children of a process, theirs, and so on, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(entry.parent.name))
    found = [process]
    for each in found:
        found += children.get(each, [])
    return found[1:]


def command_of(process: int) -> list[str]:
    """Its command line; empty if it has ended."""
    try:
        return (Path("/proc") / str(process) / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


def kill(machine: int, victim: str, drawn: random.Random) -> str | None:
    """Kill -9 one rank, the launcher (or what grows the checkpoint), or the whole tree.

    Returns:
        What was killed; None if there is no such process at the moment.
    """
    below = descendants(machine)
    # The guard's command line holds that of its child, which comes after it.
    launchers = [process for process in below if "torch.distributed.run" in command_of(process)]
    ranks = [process for process in below if TRAINER in command_of(process) and process not in launchers]
    growers = [process for process in below if any("grow_checkpoint" in word for word in command_of(process))]
    growing = growers[1:]
    choices = {"rank": ranks, "launcher": launchers[1:] or growing, "tree": [machine]}[victim]
    if not choices:
        return None
    if victim == "tree":
        kill_tree(machine)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(drawn.choice(choices), signal.SIGKILL)
    return "growth" if choices is growing else victim


def kill_tree(machine: int) -> None:
    """All at once: who has been stopped starts nothing more."""
    stopped: list[int] = []
    while new := [process for process in (machine, *descendants(machine)) if process not in stopped]:
        for process in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
        stopped += new
    for process in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
