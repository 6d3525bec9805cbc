"""The manifest of a checkpoint: what the run was, and which shard holds which interval of which tensor.

Every parameter splits on its rows alone, so what a rank holds of it, under tensor, pipeline and ZeRO
partitioning alike, is one interval of the flattened parameter.  A checkpoint is a set of such intervals.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_tokenformer.data.provenance import TokenizerRecord
from megatron_tokenformer.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHT, FIRST_MOMENT, SECOND_MOMENT = "weight", "exp_avg", "exp_avg_sq"
MOMENTS = (FIRST_MOMENT, SECOND_MOMENT)
STATES = (WEIGHT, *MOMENTS)


@dataclass(frozen=True)
class Interval:
    """Elements [start, stop) of a flattened parameter."""

    name: str
    start: int
    stop: int

    def key(self, state: str) -> str:
        """The name under which a shard stores one state of this interval."""
        return f"{self.name}/{state}/{self.start}"


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint."""

    file: str
    size: int
    hash: str
    intervals: list[Interval]


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but the numbers themselves."""

    config: dict[str, Any]
    """the resolved configuration of the run that wrote it"""
    step: int
    """optimizer steps done in the present run (a growth starts a new run at 0)"""
    position: int
    """samples of the training blend that have been seen, over all runs"""
    adam_step: int
    """updates that the Adam moments have seen"""
    taus: dict[str, dict[str, float]]
    """per role the start, the end and the steps of tau's schedule"""
    shapes: dict[str, list[int]]
    """full shape of every parameter by canonical name"""
    states: list[str]
    """weight, and the moments unless a growth dropped them"""
    shards: list[Shard]
    totals: dict[str, float] = field(default_factory=lambda: {"tokens": 0, "flops": 0.0})
    """tokens and floating-point operations spent since the first run"""
    loss: float | None = None
    """the last training loss that was logged"""
    val_loss: float | None = None
    """the last validation loss that was measured"""
    loss_scaler: dict[str, float] = field(default_factory=dict)
    """of a run in fp16"""
    layout: dict[str, int] = field(default_factory=dict)
    """the sizes of the layout that wrote it; for the reader's interest only"""
    history: list[dict[str, Any]] = field(default_factory=list)
    """one entry per growth and shrinking, told apart by its `kind` (one without it is a growth)"""
    tokenizer: TokenizerRecord | None = None
    """what made the data; None if no description told"""
    source_tokens: dict[str, int] = field(default_factory=dict)
    """ids in each training source, by prefix"""
    version: int = FORMAT_VERSION

    def locate(self, wanted: Interval) -> list[tuple[Shard, Interval]]:
        """The stored intervals that overlap a wanted one, in order."""
        return [
            (shard, interval)
            for interval, shard in self.index[wanted.name]
            if interval.start < wanted.stop and wanted.start < interval.stop
        ]

    @cached_property
    def index(self) -> dict[str, list[tuple[Interval, Shard]]]:
        """The stored intervals of each tensor in order, with their shards."""
        index: dict[str, list[tuple[Interval, Shard]]] = defaultdict(list)
        for shard in self.shards:
            for interval in shard.intervals:
                index[interval.name].append((interval, shard))
        for pieces in index.values():
            pieces.sort(key=lambda piece: piece[0].start)
        return index


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of one checkpoint.

    Raises:
        UserError: no manifest, not JSON, another version, shard names that leave the folder, sizes that are
            not the files', or intervals that overlap, leave gaps or exceed their tensor.
    """
    path = folder / MANIFEST
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version = stored["version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version}; this program reads {FORMAT_VERSION}", 1)
        shards = [
            Shard(s["file"], s["size"], s["hash"], [Interval(*interval) for interval in s["intervals"]])
            for s in stored["shards"]
        ]
        manifest = TypeAdapter(Manifest).validate_python({**stored, "shards": shards})
        _check_structure(manifest)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", 1) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged: {key}: {first['msg']}", 1) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}", 1) from None
    _check_files(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest durably; the caller has written and fsynced all shards before."""
    stored = asdict(manifest)
    for shard in stored["shards"]:
        shard["intervals"] = [list(interval.values()) for interval in shard["intervals"]]
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(stored, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _check_structure(manifest: Manifest) -> None:
    for kind, needed in (("taus", {"qkv", "output", "ffn"}), ("totals", {"tokens", "flops"})):
        missing = needed - getattr(manifest, kind).keys()
        if missing:
            raise ValueError(f"{kind} lack {', '.join(sorted(missing))}")
    if any(tau.keys() != {"start", "end", "steps"} for tau in manifest.taus.values()):
        raise ValueError("a tau lacks its start, end or steps")
    if WEIGHT not in manifest.states or not set(manifest.states) <= set(STATES):
        raise ValueError(f"states are {manifest.states}")
    for shard in manifest.shards:
        name = PurePosixPath(shard.file)
        if len(name.parts) != 1 or shard.file in ("", ".", ".."):
            raise ValueError(f"shard name '{shard.file}' is not a plain file name")
    unknown = manifest.index.keys() - manifest.shapes.keys()
    if unknown:
        raise ValueError(f"intervals of an unknown tensor {min(unknown)}")
    for name, shape in manifest.shapes.items():
        end = 0
        for interval, shard in manifest.index[name]:
            if interval.start != end or interval.stop <= interval.start:
                kind = "gap" if interval.start > end else "overlap"
                raise ValueError(f"{kind} in {name} at element {min(end, interval.start)} ({shard.file})")
            end = interval.stop
        if end != math.prod(shape):
            raise ValueError(f"{name} of shape {shape} has {end} stored elements")


def _check_files(folder: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        path = folder / shard.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"checkpoint shard {path}: {error.strerror}", 1) from None
        if size != shard.size:
            raise UserError(f"checkpoint shard {path} has {size} bytes, its manifest says {shard.size}", 1)
