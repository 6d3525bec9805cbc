"""Files that are there after a crash: written, and only then named.

And what is asked before: whether a lock is free, and whether a folder takes files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write a small file and wait until its content is on the disk (its name may not be)."""
    with naming(path), open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """Replace a small file so that it holds the old text or the new, whatever happens."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        write_durably(temporary, text)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Whether the lock of an open file is ours now; None where its file system has no locks.

    That is Lustre without -o flock.  The kernel drops a lock when the last process that has it open is gone.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def unwritable(folder: Path) -> str | None:
    """Why no file can be made in a folder, as part of a sentence; None if one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):  # rights do not tell: root has all, even in /proc
            return None
    except OSError as error:
        return f"nothing can be written in {folder} ({error.strerror})"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in the error of a write, which does not know it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None
