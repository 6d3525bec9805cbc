"""A process between the stage machine and a launcher: what the launcher started never outlives the machine.

`python -m megatron_tokenformer.progressive.guard SIGNAL MACHINE_PID COMMAND...`; SIGNAL asks the command to
leave.  It holds the lock's descriptor, so that a machine that was killed outright is followed by the next one
only when the old ranks are gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

from megatron_tokenformer.errors import is_second

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""that ask to leave"""
LINGER_SECONDS = 60.0
"""how long ranks may take to save and end when they are told to"""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(argv: list[str]) -> int:
    """Run a command in a session of its own; return its exit code, 128 + N after signal N.

    A first SIGTERM (the kernel sends it when the machine dies), SIGUSR1 or SIGINT asks the command to leave;
    what its launcher does not pass on to its ranks, `_end_rest` does.  The same once more kills it.
    """
    asks, machine, *command = argv
    leave = signal.Signals[asks]
    child: subprocess.Popen[bytes] | None = None
    told: list[tuple[int, float]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        told.append((number, time.monotonic()))
        if child is None:
            return
        if len(told) == 1:
            child.send_signal(leave)
        elif is_second(told[0], told[-1]):
            _signal(_living(), signal.SIGKILL)

    for number in SIGNALS:
        signal.signal(number, stop)
    kernel = ctypes.CDLL(None)
    # Who loses its launcher becomes a child of ours; torchrun gives each rank a session of its own.
    kernel.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    kernel.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(machine):  # it died before the line above
        return 1
    child = subprocess.Popen(command, start_new_session=True)
    if told:
        child.send_signal(leave)
    code = child.wait()
    _end_rest()
    # The interpreter's end gives every handler back, and a signal in it would take the exit code's place.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return code if code >= 0 else 128 - code


def _end_rest() -> None:
    """End what a launcher left: `deepspeed` passes no SIGTERM on, and any launcher can be killed."""
    deadline = time.monotonic() + LINGER_SECONDS
    # Only our own children: they tell theirs themselves, and once is enough.
    _signal([process for process, parent in _living().items() if parent == os.getpid()], signal.SIGTERM)
    while _living() and time.monotonic() < deadline:
        time.sleep(0.1)
    _signal(_living(), signal.SIGKILL)


def _living() -> dict[int, int]:
    """The processes below this one that have not ended, and their parents."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[int(entry.parent.name)] = int(parent)
    below, found = {os.getpid()}, dict[int, int]()
    while new := {process: parent for process, parent in parents.items() if parent in below}:
        found |= new
        below = set(new)
    return found


def _signal(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
