"""Execute one command in the foreground: output streams through, signals reach it, it does not outlive us."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

from megatron_tokenformer.errors import TO_BE_CONTINUED, UserError
from megatron_tokenformer.progressive.launchers import Command

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TICK_SECONDS = 10.0
GUARD = "megatron_tokenformer.progressive.guard"


class Interrupted(Exception):
    """The command was ended by a signal to this process."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        # Ctrl-C ends things as in a shell; a scheduler that asks to leave is told to start the call again.
        self.exit_code = 128 + number if number == signal.SIGINT else TO_BE_CONTINUED


def execute(command: Command, inherited: int, tick: Callable[[float], None]) -> int:
    """Run a command to its end and return its exit code.

    A first SIGINT, SIGTERM or SIGUSR1 to this process asks the command to leave, by the signal that it has
    for that; a second one kills it.  The command has a session of its own, so that Ctrl-C does not reach it
    twice.

    Args:
        inherited: a file descriptor that stays open until all that the command started has ended.
        tick: called with the seconds since the last call, every ten seconds and at the end.

    Raises:
        Interrupted: after the command ended, if a signal came.
        UserError: there is no such command here.
    """
    for path, text in command.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if shutil.which(command.argv[0]) is None:
        written = "".join(f"; {path} is written, for you to submit where there is" for path in command.files)
        raise UserError(f"there is no {command.argv[0]} on this host{written}", exit_code=1)
    guard: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if guard is not None:
            guard.send_signal(number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        guard = subprocess.Popen(
            [sys.executable, "-m", GUARD, command.leave_signal.name, str(os.getpid()), *command.argv],
            env={**os.environ, **command.environment},
            start_new_session=True,
            pass_fds=(inherited,),
        )
        if received:
            guard.send_signal(received[0])
        code = _wait(guard, tick)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted(received[0])
    return code


def _wait(guard: subprocess.Popen[bytes], tick: Callable[[float], None]) -> int:
    since = time.monotonic()
    while True:
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = guard.wait(TICK_SECONDS)
        now = time.monotonic()
        tick(now - since)
        since = now
        if code is not None:
            return code
