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
from pathlib import Path
from typing import Any

import megatron_tokenformer
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.training.wandb_process import START_S

STATE = "wandb-run.json"
"""in the run's folder: which W&B run it is, and how far W&B's own step is ahead of the run's"""
FINISH_S = 120
"""so long W&B may take at the end to send what is left; the rest stays on the disk"""
PIPE_BYTES = 1 << 20
MOST_BACKLOG_BYTES = 64 << 20
"""of lines that the process has not read: it is stuck"""


class WandbSink:
    """A W&B run, which a run that is started again goes on with.

    W&B refuses rows at steps before its last.  So its own step is the run's plus an offset, which grows by what
    is done again whenever the run goes back; charts are drawn against `step` (`wandb_process.py`).

    Args:
        step: the last step that counts (-1: none).  None: the sink is opened again in the middle of a run, which
            does not wait for it.
        last_step: the last step that had been logged, counting or not.
        say: prints a line.

    Raises:
        RuntimeError: W&B does not start.
    """

    def __init__(
        self, config: RunConfig, step: int | None, last_step: int | None, say: Callable[[str], None]
    ) -> None:
        self._say, self._backlog, self._partial = say, b"", b""
        self._settled, self._done, self._last = 0, 0, 0 if step is None else step
        self._state_path = Path(config.run_dir) / STATE
        self._state = _read_state(self._state_path)
        if step is not None and last_step is not None:
            self._state["offset"] += max(last_step - step, 0)
        with contextlib.suppress(OSError):  # the next start is then another W&B run, which loses nothing
            replace_durably(self._state_path, json.dumps(self._state) + "\n")
        self._synced = ""
        self._process = _start()
        self._send(_description(config, self._state["id"]))
        if step is not None:
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
        self._state["offset"] += max(self._last - step, 0)
        self._last = step
        with contextlib.suppress(OSError):
            replace_durably(self._state_path, json.dumps(self._state) + "\n")
        self._send({})  # nothing to do, but a call that is settled

    def settled(self) -> int:
        self._hear()
        settled, self._settled = self._settled, 0
        return settled

    def close(self) -> str | None:
        """Wait until all is sent, but not for ever."""
        stop = time.monotonic() + FINISH_S + 30.0  # W&B's own limit should come first
        try:
            self._send({"finish": 0})
            while self._backlog and time.monotonic() < stop:
                select.select([], [self._pipe], [], 1.0)
                self._push()
            self._pipe_end()
            self._process.wait(max(stop - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            return f"warning: W&B has not taken all rows in time; {self._sync_command()} sends them"
        finally:
            self._end()
        return None

    def _row(self, row: dict[str, Any], summary: dict[str, Any] | None = None) -> None:
        self._last = row["step"]
        command = {"row": row, "at": row["step"] + self._state["offset"]}
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
        ready, stdout = False, self._process.stdout
        assert stdout is not None
        with contextlib.suppress(BlockingIOError):
            while text := os.read(stdout.fileno(), 1 << 16):
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
                ready, self._synced = True, said["ready"]
        return ready

    def _await_ready(self) -> None:
        stop = time.monotonic() + 2 * START_S + 30.0  # online, and then offline
        while not self._hear():
            if self._process.poll() is not None and not self._hear():
                raise RuntimeError(f"its process ended with code {self._process.returncode}")
            if time.monotonic() > stop:
                raise RuntimeError("it does not start")
            select.select([self._process.stdout], [], [], 1.0)

    def _await_death(self) -> None:
        """Its last words may still be on their way."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10.0)
        self._hear()

    @property
    def _pipe(self) -> int:
        assert self._process.stdin is not None
        return self._process.stdin.fileno()

    def _pipe_end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _end(self) -> None:
        """Leave nothing behind: the process leads a group, in which W&B's own is."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _sync_command(self) -> str:
        return f"`wandb sync {self._synced}`"


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
    """What `wandb.init` gets, and two things for the process."""
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
        "finish_s": FINISH_S,
    }


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {"id": str(state["id"]), "offset": int(state["offset"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"id": secrets.token_hex(4), "offset": 0}
