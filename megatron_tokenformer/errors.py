"""The error type for mistakes of the user's, and the place where a command line makes an exit code of it."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

# A write that fails does not know the name of its file.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


TO_BE_CONTINUED = 85
"""exit code of a run that was asked to leave, and saved: the same command goes on"""
STUCK = 86
"""exit code of a run whose step took too long"""
NOBODY_READS = 141
"""exit code of a command whose output goes to one that has ended (`| head`): what shells say of SIGPIPE"""
ECHO_S = 2.0
"""schedulers and launchers tell all processes of a job what their parents pass on to them, too: a signal that
comes again within this time is the same request"""


def is_second(first: tuple[int, float], now: tuple[int, float]) -> bool:
    """Whether a signal asks a second time, which means at once; both as (number, monotonic seconds).

    Another signal than the first is none: schedulers announce the end by one and begin it with another, and
    what is being saved then may be saved.
    """
    return now[0] == first[0] and now[1] - first[1] > ECHO_S


class UserError(Exception):
    """A mistake of the user's, told in words without a traceback.

    Args:
        message: what is wrong, where, and if possible what to do; one line.
        exit_code: 2 for wrong usage or configuration, 1 for a failure of the run (bad data, a full disk).
        everywhere: every rank of the run ends with this error, so that one need tell it.
    """

    def __init__(self, message: str, exit_code: int = 2, everywhere: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.everywhere = everywhere


def printable(value: object) -> str:
    """Text that may be anyone's, without characters that would command the terminal."""
    text = str(value)
    return text if text.isprintable() else ascii(text)[1:-1]


def in_words(error: Exception) -> UserError:
    """The error to tell a user for this one; what can only be a bug of ours is raised again as it is."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL_DISK):
        where = f"{error.filename}: " if error.filename is not None else ""
        return UserError(f"{where}{error.strerror}", exit_code=1)
    raise error


def nobody_reads(stream: TextIO) -> bool:
    """Whether a stream is a pipe or a socket whose other end is closed."""
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def run_cli(main: Callable[[], int | None], program: str | None = None) -> NoReturn:
    """Call `main` and leave the process with its exit code.

    A mistake of the user's, or a file that cannot be read or written, becomes one line on standard error and
    an exit code, Ctrl-C becomes 130 as in a shell, and a reader of the output that has ended is no error to
    speak of.  Any other exception is a bug of ours and keeps its traceback.

    Args:
        program: what usage lines call it; by default the name of its file.
    """
    if program is not None:
        sys.argv[0] = program
    try:
        try:
            code = main()
        finally:  # argparse leaves after --help
            print(end="", flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        streams = [stream for stream in (sys.stdout, sys.stderr) if nobody_reads(stream)]
        if not streams:
            raise
        for stream in streams:  # the interpreter flushes them at its end, and would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(NOBODY_READS)
    except Exception as error:
        told = in_words(error)
        print(f"error: {told}", file=sys.stderr)
        sys.exit(told.exit_code)
    sys.exit(code or 0)
