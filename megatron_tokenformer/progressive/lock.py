"""One stage machine at a time on a run_dir, on this host or another that shares the folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_tokenformer.durable import try_lock
from megatron_tokenformer.errors import UserError

LOCK = "lock"
ORPHAN_SECONDS = 90.0
"""how long the command of a machine that was killed may take to end (guard.LINGER_SECONDS, and some)"""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as the file tells."""

    host: str
    pid: int
    job: str | None = None
    """the SLURM job that it runs in"""

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), os.environ.get("SLURM_JOB_ID"))

    def is_gone(self) -> bool:
        """Whether it has certainly ended: a process of this host, or of a job that ended or began anew."""
        if self.host == socket.gethostname():
            return not _alive(self.pid)
        if self.job is None:
            return False
        return self.job == os.environ.get("SLURM_JOB_ID") or not _runs(self.job)


@contextmanager
def exclusive(folder: Path, patience: float = ORPHAN_SECONDS) -> Iterator[int]:
    """Hold the folder's lock; yields its descriptor, for the commands to inherit.

    The kernel drops the lock when the last process that has it open is gone, so on one host a dead machine
    never blocks, and one whose command still runs does.  Not all shared file systems pass locks between
    hosts, so the holder's host, process and SLURM job are in the file too, and another host's is taken over
    only if SLURM says that its job has ended, or if that job is this one, requeued.

    Raises:
        UserError: another machine works here (exit code 1).
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, folder, time.monotonic() + patience)
        _write(descriptor, json.dumps(asdict(Holder.here())))
        yield descriptor
        _write(descriptor, "")
    except BaseException:
        if _holder(descriptor) == Holder.here():
            _write(descriptor, "")
        raise
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path, deadline: float) -> None:
    told = False
    while True:
        locked = try_lock(descriptor)
        holder = _holder(descriptor)
        dead = holder is not None and holder.is_gone()
        ours = holder is None or holder.host == socket.gethostname()
        if (locked and (ours or dead)) or (locked is None and (holder is None or dead)):
            return
        if not dead or time.monotonic() > deadline:
            raise UserError(_refusal(folder, holder), exit_code=1)
        if not told:
            print("waiting for the command of a call that was killed to end", flush=True)
            told = True
        time.sleep(0.2)


def _refusal(folder: Path, holder: Holder | None) -> str:
    who = f"process {holder.pid} on {holder.host}" if holder else "another process"
    return (
        f"{folder} is in use by {who}, or by a command that it started; wait for it or end it "
        f"(only if it is certainly gone: delete {folder / LOCK})"
    )


def _holder(descriptor: int) -> Holder | None:
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        return Holder(str(record["host"]), int(record["pid"]), record.get("job"))
    except (ValueError, KeyError, TypeError):
        return None


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _runs(job: str) -> bool:
    """Whether a SLURM job still has processes, or may have: SLURM cannot be asked."""
    active = "RUNNING,COMPLETING,CONFIGURING,SUSPENDED"
    try:
        asked = subprocess.run(
            ["squeue", "-h", "-j", job, "-t", active, "-o", "%T"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    return bool(asked.stdout.strip()) or (asked.returncode != 0 and "Invalid job id" not in asked.stderr)


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
