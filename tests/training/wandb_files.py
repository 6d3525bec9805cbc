"""What is in the files that W&B writes, by their format: a log of LevelDB's kind that holds protobufs."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768
FIRST_HEADER = 7
"""bytes before the first record: `:W&B`, a magic number, a version"""
FULL, LAST = 1, 4


def wandb_files(run_folder: Path) -> list[Path]:
    """A run's files, in the order in which they were begun."""
    found = (run_folder / "wandb").glob("*run-*-*/run-*.wandb")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def records(path: Path) -> Iterator[Any]:
    """The protobufs in a file, up to one that is cut short."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, parts = FIRST_HEADER, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if length == kind == 0 or place + 7 + length > len(data):
            return
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def run_of(path: Path) -> Any:
    """Id, project, group, name and config (a mapping) that a file begins with."""
    (run,) = [record.run for record in records(path) if record.HasField("run")]
    return run


def config_of(path: Path) -> dict[str, Any]:
    return {item.key: json.loads(item.value_json) for item in run_of(path).config.update}


def history_of(path: Path) -> list[dict[str, Any]]:
    """The rows, with W&B's own step as `_step`."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        | {"_step": record.history.step.num}
        for record in records(path)
        if record.HasField("history")
    ]
