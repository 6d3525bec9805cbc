"""One run at a time in a run_dir: two would take each other's unfinished checkpoints for dead saves'."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_tokenformer.durable import try_lock
from megatron_tokenformer.errors import UserError

LOCK = ".lock"
PATIENCE_S = 60.0
"""how long a run that was told to end may take to"""


@contextlib.contextmanager
def only_run(folder: Path, patience: float = PATIENCE_S) -> Iterator[None]:
    """Hold the folder's lock.  The kernel drops it with the process, however that ends.

    Where a folder cannot be written, or its file system has no locks (Lustre without -o flock), nothing is
    held.

    Raises:
        UserError: another run still holds it after `patience` seconds.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        yield
        return
    try:
        _acquire(descriptor, folder, time.monotonic() + patience)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path, deadline: float) -> None:
    told = False
    while try_lock(descriptor) is False:
        if time.monotonic() > deadline:
            raise UserError(
                f"another run is at work in {folder}; wait for it, end it, or give another run_dir", 1
            )
        if not told:
            print(f"waiting for another run in {folder} to end", flush=True)
            told = True
        time.sleep(0.2)
