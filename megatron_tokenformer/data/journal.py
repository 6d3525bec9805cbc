"""The journal of a preprocessing run, by which a killed one goes on: which inputs its outputs hold."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tokenformer.data.indexed import TokenFileWriter, publish_pair
from megatron_tokenformer.data.sidecar import read_sidecar
from megatron_tokenformer.durable import write_durably
from megatron_tokenformer.errors import UserError

_VERSION = 1
_SECONDS_BETWEEN = 2.0


@dataclass
class Counts:
    """What is in one output so far."""

    prefix: str
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty_texts: int = 0
    eod_inside_text: int = 0


@dataclass
class Done:
    """What a run has done, at the end of an input file."""

    inputs: list[list[Any]] = field(default_factory=list)
    """path, bytes and time stamp of each finished file"""
    outputs: dict[str, Counts] = field(default_factory=dict)
    """by component"""
    problems: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    """all files are on the disk, and get their names"""


class Journal:
    """The file that keeps what a run has done.

    Args:
        path: its name; it is there as long as a run is unfinished.
        settings: what the outputs depend on besides their inputs; a run with others cannot go on.
    """

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self.path = path
        self._settings = settings
        self._written = time.monotonic()

    def publish(self, inputs: Sequence[list[Any]]) -> list[dict[str, Any]] | None:
        """Give complete outputs of a killed run their names.

        Returns:
            The descriptions, if they are what the present run would make.
        """
        done, settings = self._load()
        if not done.complete:
            return None
        prefixes = [counts.prefix for counts in done.outputs.values() if counts.documents]
        for prefix in prefixes:
            publish_pair(prefix)
        self.remove()
        same = settings == self._settings and done.inputs == list(inputs)
        found = [read_sidecar(prefix) for prefix in prefixes] if same else []
        return [sidecar for sidecar in found if sidecar] or None

    def read(self, inputs: Sequence[list[Any]], *, skipping: bool) -> Done:
        """What an unfinished run has done of the present one; nothing if there is none.

        Args:
            inputs: path, bytes and time stamp of the files to read now; those already read must be the same.
            skipping: whether bad input may have been skipped.

        Raises:
            UserError: the unfinished run was another one, or the journal cannot be read.
        """
        done, settings = self._load()
        keys = {**settings, **self._settings}
        changed = [key for key in keys if settings.get(key) != self._settings.get(key)]
        reason = None
        if changed:
            reason = f"has other settings ({', '.join(changed)})"
        elif done.inputs != list(inputs[: len(done.inputs)]):
            reason = "has read other input files, or they have changed since"
        elif done.problems and not skipping:
            reason = "has skipped bad input, which is now to fail"
        if reason:
            raise UserError(
                f"an unfinished run of the same output {reason}; give its command again to go on with it, or "
                "--restart to drop what it has done"
            )
        return done

    def drop(self) -> None:
        """Remove what an unfinished run has left.

        Raises:
            UserError: it is not dead.
        """
        done = Done()
        with suppress(UserError):  # a damaged journal names no files
            done, _ = self._load()
        for counts in done.outputs.values():
            # Opened to be sure that no process writes it.
            TokenFileWriter(counts.prefix, np.dtype(np.uint16)).discard()
        self.remove()

    def _load(self) -> tuple[Done, dict[str, Any]]:
        """What is in the file, with its settings; nothing done, with our settings, if there is none."""
        try:
            with open(self.path, encoding="utf-8") as file:
                found = json.load(file)
            outputs = {name: Counts(**counts) for name, counts in found["done"]["outputs"].items()}
            done = Done(**{**found["done"], "outputs": outputs})
            if found["version"] != _VERSION:
                raise ValueError("version")
            return done, found["settings"]
        except FileNotFoundError:
            return Done(), self._settings
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}", exit_code=1) from error
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.path} is damaged; --restart begins anew", exit_code=1) from None

    @property
    def exists(self) -> bool:
        """Whether there is a state to go on from."""
        return os.path.exists(self.path)

    def is_due(self) -> bool:
        """Whether so much time has passed that writing it is worth its cost."""
        return time.monotonic() - self._written > _SECONDS_BETWEEN

    def write(self, done: Done) -> None:
        """Replace the file durably; the outputs must be durable already."""
        content = {"version": _VERSION, "settings": self._settings, "done": asdict(done)}
        write_durably(Path(f"{self.path}.tmp"), json.dumps(content))
        os.replace(f"{self.path}.tmp", self.path)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Remove the file: nothing is unfinished."""
        for path in (f"{self.path}.tmp", self.path):
            if os.path.exists(path):
                os.remove(path)
