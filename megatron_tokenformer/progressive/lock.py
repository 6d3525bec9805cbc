"""One stage machine at a time on a run_dir, on this host or another that shares the folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tokenformer.errors import UserError

LOCK = "lock"
ORPHAN_SECONDS = 90.0
"""how long the command of a machine that was killed may take to end (guard.LINGER_SECONDS, and some)"""


@contextmanager
def exclusive(folder: Path, patience: float = ORPHAN_SECONDS) -> Iterator[int]:
    """Hold the folder's lock; yields its descriptor, for the commands to inherit.

    The kernel drops the lock when the last process that has it open is gone, so on one host a dead machine
    never blocks, and one whose command still runs does.  Not all shared file systems pass locks between
    hosts, so the holder's host and process are in the file too, and another host's is never taken over.

    Raises:
        UserError: another machine works here (exit code 1).
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, folder, time.monotonic() + patience)
        _write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        yield descriptor
        _write(descriptor, "")
    except BaseException:
        if _holder(descriptor) == (socket.gethostname(), os.getpid()):
            _write(descriptor, "")
        raise
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path, deadline: float) -> None:
    told = False
    while True:
        locked = _try_lock(descriptor)
        holder = _holder(descriptor)
        dead = holder is not None and holder[0] == socket.gethostname() and not _alive(holder[1])
        ours = holder is None or holder[0] == socket.gethostname()
        if (locked and ours) or (locked is None and (holder is None or dead)):
            return
        if not dead or time.monotonic() > deadline:
            raise UserError(_refusal(folder, holder), exit_code=1)
        if not told:
            print("waiting for the command of a call that was killed to end", flush=True)
            told = True
        time.sleep(0.2)


def _refusal(folder: Path, holder: tuple[str, int] | None) -> str:
    who = f"process {holder[1]} on {holder[0]}" if holder else "another process"
    return (
        f"{folder} is in use by {who}, or by a command that it started; wait for it or end it "
        f"(only if it is certainly gone: delete {folder / LOCK})"
    )


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has no locks (Lustre without -o flock)."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _holder(descriptor: int) -> tuple[str, int] | None:
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        return str(record["host"]), int(record["pid"])
    except (ValueError, KeyError, TypeError):
        return None


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # not us: in containers each call gets the same number
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
