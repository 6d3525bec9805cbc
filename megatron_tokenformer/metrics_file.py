"""The rows of a run, RUN_DIR/metrics.jsonl: one JSON object a line, in the order of steps.

And what the records of its end beside them are called.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

METRICS = "metrics.jsonl"
FINISHED = "finished.json"
"""the record of a run that has all its steps; launchers' exit codes do not prove it"""
INTERRUPTED = "interrupted.json"
"""the record of a run that was asked to leave, and saved; it stays until the run is started again"""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; lines that are damaged are left out."""
    return [row for row, _ in iterate_rows(path) if row is not None]


def iterate_rows(path: Path) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Each row and the byte at which it ends; a file of any size.

    A damaged line is None, as what comes after it is as good as ever; but if it is the last, a write has been
    cut short, and it does not count.
    """
    end, damaged = 0, None
    with open(path, "rb") as file:
        for line in file:
            if damaged is not None:
                yield None, damaged
            end += len(line)
            row = _row(line)
            damaged = end if row is None else None
            if row is not None:
                yield row, end


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = orjson.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def drop_rows_after(path: Path, step: int) -> int | None:
    """Drop the rows of a metrics file that belong to later steps, and a last row that is cut short.

    Rows are in the order of steps, so that this is one cut, which happens or does not.  A damaged line,
    and a row without a step, stays if the row before it does.

    Returns:
        The last step that the file had; None if it had no row.
    """
    if not path.exists():
        return None
    kept, last = 0, None
    for row, end in iterate_rows(path):
        if row is not None and isinstance(row.get("step"), int):
            last = row["step"]
        if last is None or last <= step:
            kept = end
    if kept < path.stat().st_size:
        os.truncate(path, kept)
    return last


class MetricsFile:
    """Writes rows.  What cannot be written waits in memory and is tried again with the next row.

    A disk that is full for an hour is no reason to end a run of a month; nor are its numbers to be lost.

    Args:
        step: the last step whose rows stay; those after it are of steps that are done again.

    Raises:
        OSError: the file cannot be opened; later failures are told by `problem` instead.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.problem: str | None = None
        """why rows are waiting; None if none are"""
        self.last_step = drop_rows_after(path, step)
        """the last step that the file had before its later rows were dropped"""
        self.waiting: list[dict[str, Any]] = []
        """rows that are not in the file (yet)"""
        self._cut: int | None = None
        self._end: int | None = None
        self._file: int | None = None
        self._open()

    def write(self, row: dict[str, Any]) -> None:
        """Add a row.  JSON has no infinity: what is not finite, as the norm of a skipped step, is null."""
        self.waiting.append({key: finite(value) for key, value in row.items()})
        self.flush()

    def rewind(self, step: int) -> None:
        """Drop the rows after this step."""
        self.waiting = [row for row in self.waiting if row["step"] <= step]
        self._cut = step if self._cut is None else min(step, self._cut)
        self._close()
        self.flush()

    def flush(self) -> None:
        """Write all rows that are waiting; if that fails, `problem` says why."""
        try:
            if self._cut is not None:
                drop_rows_after(self.path, self._cut)
                self._cut = self._end = None
            if self._file is None:
                self._open()
            text = "".join(json.dumps(row) + "\n" for row in self.waiting).encode()
            self._write(text)
        except OSError as error:
            self.problem = error.strerror or str(error)
            # A descriptor may be dead for ever, as after a file server's restart.
            self._close()
        else:
            self.waiting, self.problem = [], None

    def close(self) -> None:
        """Write what is waiting, if that is possible, and close."""
        if self.waiting or self._cut is not None:
            self.flush()
        self._close()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        # What a failed write left behind the last whole row is written over.
        size = os.fstat(self._file).st_size
        self._end = size if self._end is None else min(self._end, size)

    def _write(self, text: bytes) -> None:
        assert self._file is not None and self._end is not None
        done = 0
        while done < len(text):
            done += os.pwrite(self._file, text[done:], self._end + done)
        self._end += len(text)

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


def finite(value: Any) -> Any:
    """None for an infinity and for what is not a number, else the value."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
