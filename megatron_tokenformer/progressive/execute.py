"""Execute one command in the foreground: output streams through, signals reach it, it does not outlive us."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.progressive.guard import SIGNALS
from megatron_tokenformer.progressive.launchers import Command

TICK_SECONDS = 10.0
GUARD = "megatron_tokenformer.progressive.guard"


class Asked:
    """The signals that have asked this process to leave, in order; what it executes is asked too.

    A scheduler's notice may come at any moment, and SIGUSR1 would end a process that does not expect it.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.command: subprocess.Popen[bytes] | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """A signal has come."""
        self.numbers.append(number)
        if self.command is not None:
            self.command.send_signal(number)

    @contextlib.contextmanager
    def listening(self, *signals: signal.Signals) -> Iterator[None]:
        """Note these signals while inside; only the main thread can."""
        before = {number: signal.signal(number, self.note) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def execute(command: Command, inherited: int, tick: Callable[[float], None], asked: Asked) -> int:
    """Run a command to its end and return its exit code.

    A first SIGINT, SIGTERM or SIGUSR1 to this process asks the command to leave, by the signal that it has
    for that; the same once more kills it.  The command has a session of its own, so that Ctrl-C does not
    reach it twice.

    Args:
        inherited: a file descriptor that stays open until all that the command started has ended.
        tick: called with the seconds since the last call, every ten seconds and at the end.
        asked: notes the signals.

    Raises:
        UserError: there is no such command here.
    """
    for path, text in command.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if shutil.which(command.argv[0]) is None:
        written = "".join(f"; {path} is written, for you to submit where there is" for path in command.files)
        raise UserError(f"there is no {command.argv[0]} on this host{written}", exit_code=1)
    with asked.listening(*SIGNALS):
        asked.command = guard = subprocess.Popen(
            [sys.executable, "-m", GUARD, command.leave_signal.name, str(os.getpid()), *command.argv],
            env={**os.environ, **command.environment},
            start_new_session=True,
            pass_fds=(inherited,),
        )
        try:
            if asked.numbers:  # before there was anything to tell
                guard.send_signal(asked.numbers[0])
            return _wait(guard, tick)
        finally:
            asked.command = None


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
