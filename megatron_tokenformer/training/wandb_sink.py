"""The run's side of Weights & Biases: lines into the pipe of a process of its own (`wandb_process.py`)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_tokenformer
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.durable import replace_durably

STATE = "wandb-run.json"
"""in the run's folder: which W&B run it is, and how far W&B's own step is ahead of the run's"""
START_S = 60.0
"""so long W&B may take to reach its server before the run is written offline"""
FINISH_S = 120.0
"""so long W&B may take at the end to send what is left; the rest stays on the disk"""
GRACE_S = 30.0
"""so long its process may take longer than W&B's own limits"""
PIPE_BYTES = 1 << 20
MOST_BACKLOG_BYTES = 64 << 20
"""of lines that the process has not read: it is stuck"""


@dataclass
class WandbState:
    """Which W&B run a run's folder belongs to."""

    path: Path
    identity: str
    offset: int = 0
    """how far W&B's own step is ahead of the run's"""
    last: int = -1
    """the last step that was logged"""

    @classmethod
    def read(cls, folder: Path) -> WandbState:
        """Of a run's folder; of a new W&B run if it has none yet."""
        path = folder / STATE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, str(stored["id"]), int(stored["offset"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls(path, secrets.token_hex(4))

    def go_back(self, step: int) -> None:
        """The run goes on from an earlier step than the last, or from that."""
        if self.last > step:  # and what comes next may be of that very step
            self.offset += self.last - step + 1
        self.last = step
        # If it cannot be kept, the next start is another W&B run, or loses rows there: no reason to end this.
        with contextlib.suppress(OSError):
            stored = {"id": self.identity, "offset": self.offset}
            replace_durably(self.path, json.dumps(stored) + "\n")


class WandbSink:
    """A W&B run, which a run that is started again goes on with.

    W&B refuses rows at steps before its last.  So its own step is the run's plus an offset, which grows by
    what is done again whenever the run goes back; charts are drawn against `step` (`wandb_process.py`).

    Args:
        start: the last step that counts (-1: none), and the last that had been logged, counting or not (None:
            none).  Without, the sink is opened again in the middle of a run, which does not wait for it.
        say: prints a line.

    Raises:
        RuntimeError: W&B does not start.
    """

    def __init__(
        self,
        config: RunConfig,
        state: WandbState,
        start: tuple[int, int | None] | None,
        say: Callable[[str], None],
    ) -> None:
        self._state, self._say = state, say
        self._backlog, self._partial, self._synced = b"", b"", ""
        self._settled, self._done = 0, 0
        self._services: list[int] = []
        if start is not None:
            step, last_step = start
            state.last = step if last_step is None else max(last_step, step)
            state.go_back(step)
        self._process = _start()
        self._send(_description(config, state.identity))
        if start is not None:
            self._await_ready()

    def log(self, row: dict[str, Any]) -> None:
        self._row({key: value for key, value in row.items() if value is not None})

    def event(self, row: dict[str, Any], told: str) -> None:
        kind = row["event"]
        numbers = {
            f"{kind}/{key}": value
            for key, value in row.items()
            if isinstance(value, (int, float)) and key != "step"
        }
        summary = {f"events/{row['step']:08d} {kind}": told}
        self._row({"step": row["step"], "event": kind, "told": told, **numbers}, summary)

    def rewind(self, step: int) -> None:
        self._state.go_back(step)
        self._send({})  # nothing to do, but a call that is settled

    def settled(self) -> int:
        self._hear()
        settled, self._settled = self._settled, 0
        return settled

    def close(self) -> str | None:
        """Wait until all is sent, but not for ever."""
        stop = time.monotonic() + FINISH_S + GRACE_S
        try:
            self._send({"finish": 0})
            while self._backlog and time.monotonic() < stop:
                select.select([], [self._pipe], [], 1.0)
                self._push()
            self._pipe_end()
            code = self._process.wait(max(stop - time.monotonic(), 0.0))
            self._hear()
            if code != 0:
                raise RuntimeError(f"its process ended with code {code}")
        except subprocess.TimeoutExpired:
            return f"warning: W&B has not taken all rows in time; `wandb sync {self._synced}` sends them"
        finally:
            self._end()
        return None

    def _row(self, row: dict[str, Any], summary: dict[str, Any] | None = None) -> None:
        self._state.last = row["step"]
        command = {"row": row, "at": row["step"] + self._state.offset}
        self._send({**command, "summary": summary} if summary else command)

    def _send(self, command: dict[str, Any]) -> None:
        self._backlog += json.dumps(command).encode() + b"\n"
        self._push()
        self._hear()
        if len(self._backlog) > MOST_BACKLOG_BYTES:
            raise RuntimeError("it has not read rows for long")

    def _push(self) -> None:
        """Write as much as the pipe takes."""
        with contextlib.suppress(BlockingIOError):
            while self._backlog:
                try:
                    written = os.write(self._pipe, self._backlog)
                except BrokenPipeError:
                    self._await_death()
                    raise RuntimeError("its process has ended") from None
                self._backlog = self._backlog[written:]

    def _hear(self) -> bool:
        """Take in what the process has answered; whether it is ready.

        Raises:
            RuntimeError: it failed; in its words.
        """
        ready = False
        with contextlib.suppress(BlockingIOError):
            while text := os.read(self._answers, 1 << 16):
                self._partial += text
        *lines, self._partial = self._partial.split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "failed" in said:
                raise RuntimeError(said["failed"])
            if "told" in said:
                self._say(said["told"])
            if "done" in said:
                self._settled, self._done = self._settled + said["done"] - self._done, said["done"]
            if "ready" in said:
                ready, self._synced, self._services = True, said["ready"], said["services"]
        return ready

    def _await_ready(self) -> None:
        stop = time.monotonic() + 2 * START_S + GRACE_S  # online, and then offline
        while not self._hear():
            if self._process.poll() is not None and not self._hear():
                raise RuntimeError(f"its process ended with code {self._process.returncode}")
            if time.monotonic() > stop:
                raise RuntimeError("it does not start")
            select.select([self._answers], [], [], 1.0)

    def _await_death(self) -> None:
        """Its last words may still be on their way."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10.0)
        self._hear()

    @property
    def _pipe(self) -> int:
        assert self._process.stdin is not None
        return self._process.stdin.fileno()

    @property
    def _answers(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def _pipe_end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _end(self) -> None:
        """Leave nothing behind that hangs."""
        if self._process.poll() is None:
            for pid in (self._process.pid, *self._services):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _start() -> subprocess.Popen[bytes]:
    package = str(Path(megatron_tokenformer.__file__).resolve().parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_tokenformer.training.wandb_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert process.stdin is not None and process.stdout is not None
    for pipe in (process.stdin, process.stdout):
        os.set_blocking(pipe.fileno(), False)
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it; without, the backlog is ours
        fcntl.fcntl(process.stdin.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return process


def _description(config: RunConfig, identity: str) -> dict[str, Any]:
    """What `wandb.init` gets, and three things for the process."""
    wandb = config.logging.wandb
    told = {"stage": Path(config.run_dir).name, "parameters": parameter_count(config.model)}
    return {
        "id": identity,
        "resume": "allow",
        "project": wandb.project,
        "group": wandb.group,
        "name": Path(config.run_dir).name,
        "dir": config.run_dir,
        "mode": wandb.mode,
        "config": {**config.model_dump(mode="json"), **told},
        "pid": os.getpid(),
        "start_s": START_S,
        "finish_s": FINISH_S,
    }
