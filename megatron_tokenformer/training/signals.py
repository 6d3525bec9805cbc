"""Requests to leave: SIGTERM, SIGUSR1, or the end of the time that a call may take.

Signals are taken by a thread that reads the C handler's own note of them, so that they are seen while the
main thread waits in a collective.  A first one is a request: the ranks agree on it in the next step
(`agreement.py`), save and leave with exit code 85.  A second one ends this process at once.  A checkpoint
that is being written is not there yet, and the one before it stays.  The thread that writes checkpoints takes
no part in this.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

from megatron_tokenformer.errors import is_second
from megatron_tokenformer.parallel import lifeline

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REASONS = ("SIGTERM", "SIGUSR1", "training.max_minutes")


class Requests:
    """What asks this rank to leave.

    Args:
        max_minutes: how long after now the time is over; None: never.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self._ends = float("inf") if max_minutes is None else time.monotonic() + 60.0 * max_minutes
        self._received: signal.Signals | None = None
        self._since = 0.0

    def pending(self) -> list[bool]:
        """Which of REASONS there are on this rank."""
        name = self._received.name if self._received else None
        return [name == "SIGTERM", name == "SIGUSR1", time.monotonic() >= self._ends]

    def receive(self, number: int) -> None:
        """A signal has come."""
        if number not in SIGNALS:
            return
        if self._received is None:
            self._received, self._since = signal.Signals(number), time.monotonic()
        elif is_second((self._received, self._since), (number, time.monotonic())):
            lifeline.report(f"{signal.Signals(number).name} came a second time")
            os._exit(128 + number)

    def listen(self, notes: socket.socket) -> None:
        """Receive until the other end closes."""
        while read := notes.recv(64):
            for number in read:
                self.receive(number)


@contextlib.contextmanager
def requests_to_leave(max_minutes: float | None) -> Iterator[Requests]:
    """Take SIGTERM and SIGUSR1 as requests from here on; only the main thread can."""
    requests = Requests(max_minutes)
    notes, written = socket.socketpair()
    written.setblocking(False)
    before = {number: signal.signal(number, _noted) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=requests.listen, args=(notes,), name="signals", daemon=True)
    listener.start()
    try:
        yield requests
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            if signal.getsignal(number) is _noted:
                signal.signal(number, handler)
        written.close()
        listener.join()
        notes.close()


def ignore_requests() -> None:
    """Take no more of them: all is saved, and a launcher that ends the last ranks comes too late."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _noted(number: int, frame: FrameType | None) -> None:
    """The C handler has written the number; that is all."""
