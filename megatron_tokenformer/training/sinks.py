"""Where numbers go besides metrics.jsonl, and that no error there ends a run."""

from __future__ import annotations

import importlib.util
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_tokenformer.config.load import dump_config
from megatron_tokenformer.config.schema import Logging, RunConfig
from megatron_tokenformer.errors import UserError

MOST_PENDING = 10_000
"""calls that are kept while a sink is out of order; all rows are in metrics.jsonl anyway"""
LONGEST_WAIT = 256
"""rows between two tries to open a sink again"""


class Sink(Protocol):
    """Somewhere that rows go.  Each call may raise anything."""

    def log(self, row: dict[str, Any]) -> None:
        """A row of numbers, of which `step` is one; None is no number."""
        ...

    def event(self, row: dict[str, Any], told: str) -> None:
        """A growth or a setback: its `step` and `event`, and what the terminal says of it."""
        ...

    def rewind(self, step: int) -> None:
        """The run has gone back to this step."""
        ...

    def settled(self) -> int:
        """How many of the calls were carried out since this was asked last; in their order."""
        ...

    def close(self) -> str | None:
        """The run ends; what a user should know of it, if anything."""
        ...


class Guarded:
    """A sink that may fail: that is told once, and it is opened again later, and gets what it has missed.

    Args:
        name: for the user.
        open_sink: opens it, at the start (told so by True) and after a failure.
        say: prints a line.
    """

    def __init__(self, name: str, open_sink: Callable[[bool], Sink], say: Callable[[str], None]) -> None:
        self._name, self._open, self._say = name, open_sink, say
        self._sink: Sink | None = None
        self._pending: deque[Callable[[Sink], None]] = deque()
        self._handed = 0
        """of the pending calls, those that the sink has, but has not settled"""
        self._failures, self._wait, self._lost, self._first = 0, 0, 0, True
        self._try()

    def log(self, row: dict[str, Any]) -> None:
        self._add(lambda sink: sink.log(row))

    def event(self, row: dict[str, Any], told: str) -> None:
        self._add(lambda sink: sink.event(row, told))

    def rewind(self, step: int) -> None:
        self._add(lambda sink: sink.rewind(step))

    def close(self) -> None:
        """Give it what is left, and close it."""
        self._wait = 0
        self._try()
        if self._sink is None:
            return self._lacking()
        try:
            told = self._sink.close()
        except Exception as error:
            return self._lacking(f" ({one_line(error)})")
        if told:
            self._say(told)
        elif self._failures:
            self._recovered()
        return None

    def _lacking(self, why: str = "") -> None:
        count = len(self._pending) + self._lost
        self._say(f"warning: {self._name} lacks some of the last {count} rows{why}; metrics.jsonl has all")

    def _add(self, call: Callable[[Sink], None]) -> None:
        self._pending.append(call)
        if len(self._pending) > MOST_PENDING:
            self._pending.popleft()
            self._handed = max(self._handed - 1, 0)
            self._lost += self._sink is None
        self._try()

    def _try(self) -> None:
        if self._sink is None and self._wait > 0:
            self._wait -= 1
            return
        try:
            if self._sink is None:
                first, self._first = self._first, False
                self._sink, self._handed = self._open(first), 0
            for call in list(self._pending)[self._handed :]:
                call(self._sink)
                self._handed += 1
            self._settle()
        except Exception as error:
            self._failed(error)

    def _settle(self) -> None:
        assert self._sink is not None
        for _ in range(min(self._sink.settled(), len(self._pending))):
            self._pending.popleft()
            self._handed -= 1
        if self._failures and not self._pending:
            self._recovered()

    def _recovered(self) -> None:
        missing = f", but {self._lost} rows are missing there" if self._lost else ""
        self._say(f"{self._name} is written again{missing}")
        self._failures = self._lost = 0

    def _failed(self, error: Exception) -> None:
        sink, self._sink, self._handed = self._sink, None, 0
        if sink is not None:
            try:
                sink.close()
            except Exception:
                pass  # it has failed already, which is told below
        self._failures += 1
        self._wait = min(2**self._failures, LONGEST_WAIT)
        if self._failures == 1:
            self._say(
                f"warning: {self._name} fails ({one_line(error)}); training goes on, metrics.jsonl has all "
                "rows, and it is tried again"
            )


def one_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def check_packages(logging: Logging) -> None:
    """Refuse a sink whose package is not installed.

    Raises:
        UserError: names the key and what to install.
    """
    wanted = {
        "wandb": ("wandb", f"logging.wandb.mode={logging.wandb.mode}", logging.wandb.mode != "disabled"),
        "tensorboard": ("tensorboard", "logging.tensorboard=true", logging.tensorboard),
    }
    for package, (extra, key, asked) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise UserError(f"{key} needs the package {package}: pip install 'megatron-tokenformer[{extra}]'")


def _without_tensorboard(raised: threading.ExceptHookArgs) -> None:
    """What its writing thread dies of is raised by the next call, and told then; not here as a traceback."""
    if not type(raised.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(raised)


class TensorboardSink:
    """TensorBoard's files in a folder: numbers as scalars; the config, growths and setbacks as texts.

    Args:
        step: the last step that counts; what the folder has of later ones is void.  None: all of it counts.
    """

    def __init__(self, folder: Path, config: RunConfig, step: int | None) -> None:
        self._folder, self._settled = folder, 0
        self._open(step)
        if step is not None:
            self._writer.add_text("config", f"```yaml\n{dump_config(config)}```", max(step, 0))
        self._writer.flush()

    def _open(self, step: int | None) -> None:
        threading.excepthook = _without_tensorboard
        from torch.utils.tensorboard import SummaryWriter  # costs a second, and is an option

        self._writer = SummaryWriter(str(self._folder), purge_step=None if step is None else step + 1)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, row["step"])
        self._done()

    def event(self, row: dict[str, Any], told: str) -> None:
        self._writer.add_text(f"event/{row['event']}", told, row["step"])
        self._done()

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._open(step)
        self._done()

    def settled(self) -> int:
        settled, self._settled = self._settled, 0
        return settled

    def close(self) -> None:
        self._writer.close()

    def _done(self) -> None:
        self._writer.flush()  # a writer's thread tells what went wrong only then
        self._settled += 1
