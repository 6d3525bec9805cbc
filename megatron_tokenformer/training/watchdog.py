"""Ends a run that is stuck, with the stacks of all its ranks.

Every rank watches itself: when one waits for ever in a collective, all do, and each tells where.  Then it
ends at once, without the clean-up that would wait too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from megatron_tokenformer.errors import STUCK
from megatron_tokenformer.parallel import lifeline

PATIENCE_S = 10.0
"""between the stacks and the end: a launcher ends all ranks when one has ended, and all shall tell theirs"""
BACKSTOP_S = 60.0
"""C code that holds the interpreter, such as one that waits for a page of a file on a dead file system, keeps
the thread from running; so much later faulthandler's own thread tells the stacks and ends the process (1)"""
TICK_S = 1.0


class Watchdog:
    """Watches what a rank does, one thing at a time."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._changed = threading.Condition()
        self._doing: tuple[str, float, float] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @contextlib.contextmanager
    def limit(self, what: str, minutes: float) -> Iterator[None]:
        """End this process if what is done inside takes longer; 0: never.

        Within another limit only the inner one counts, and then the outer one anew.
        """
        before = self._doing
        self._set(what, minutes)
        try:
            yield
        finally:
            self._set(*before[:2]) if before else self._set("", 0.0)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _set(self, what: str, minutes: float) -> None:
        now = time.monotonic()
        # No notice to the thread, which looks every second: a step should cost no wake-up.
        self._doing = (what, minutes, now + 60.0 * minutes) if minutes else None

    def _watch(self) -> None:
        try:
            while not self._closed:
                doing = self._doing
                if doing is None:
                    faulthandler.cancel_dump_traceback_later()
                else:
                    faulthandler.dump_traceback_later(BACKSTOP_S + 60.0 * doing[1], exit=True)
                    if time.monotonic() > doing[2]:
                        self._end(*doing[:2])
                with self._changed:
                    self._changed.wait(TICK_S)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, what: str, minutes: float) -> None:
        name = f"rank {self._rank} on {socket.gethostname()}"
        text = "".join(f"[rank {self._rank}] {line}\n" for line in stacks().splitlines())
        # In one piece, so that those of several ranks do not mix.
        print(f"error: {name}: {what} takes longer than {minutes:g} minutes\n{text}", end="", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(PATIENCE_S)
        lifeline.report(f"{what} takes longer than {minutes:g} minutes")
        os._exit(STUCK)


def stacks() -> str:
    """The Python stacks of all threads, without reading any source file."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
