"""The manifest of a checkpoint: what the run was, and which shard holds which interval of which tensor.

Every parameter splits on its rows alone, so what a rank holds of it, under tensor, pipeline and ZeRO
partitioning alike, is one interval of the flattened parameter.  A checkpoint is a set of such intervals.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictInt, TypeAdapter, ValidationError

from megatron_tokenformer.data.provenance import TokenizerRecord
from megatron_tokenformer.durable import write_durably
from megatron_tokenformer.errors import UserError, printable

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHT, FIRST_MOMENT, SECOND_MOMENT = "weight", "exp_avg", "exp_avg_sq"
MOMENTS = (FIRST_MOMENT, SECOND_MOMENT)
STATES = (WEIGHT, *MOMENTS)
MANIFEST_BYTES = 256_000_000
"""more than any manifest takes: 1,024 ranks with 200 intervals each make 11 MB"""
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")

Count = Annotated[int, Field(ge=0, lt=2**63)]
Dimension = Annotated[int, Field(ge=1, lt=2**63)]


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
    step: Count
    """optimizer steps done in the present run (a growth starts a new run at 0)"""
    position: Count
    """samples of the training blend that have been seen, over all runs"""
    adam_step: Count
    """updates that the Adam moments have seen"""
    taus: dict[str, dict[str, float]]
    """per role the start, the end and the steps of tau's schedule"""
    shapes: dict[str, list[Dimension]]
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
    """one entry per growth, widening, shrinking and import, by its `kind` (one without it is a growth)"""
    tokenizer: TokenizerRecord | None = None
    """what made the data; None if no description told"""
    source_tokens: dict[str, Count] = field(default_factory=dict)
    """ids in each training source, by prefix"""
    recent_losses: list[float] = field(default_factory=list)
    """of the last steps; what a spike is measured by"""
    setbacks: dict[str, Count] = field(default_factory=dict)
    """counts of this run: steps skipped, skipped in a row, and rollbacks"""
    owes_evaluation: bool = False
    """whether the run left when one was due"""
    version: int = FORMAT_VERSION

    def locate(self, wanted: Interval) -> list[tuple[Shard, Interval]]:
        """The stored intervals that overlap a wanted one, in order."""
        return [
            (shard, interval)
            for interval, shard in self.index.get(wanted.name, ())
            if interval.start < wanted.stop and wanted.start < interval.stop
        ]

    @cached_property
    def index(self) -> dict[str, list[tuple[Interval, Shard]]]:
        """The stored intervals of each tensor in order, with their shards."""
        index: defaultdict[str, list[tuple[Interval, Shard]]] = defaultdict(list)
        for shard in self.shards:
            for interval in shard.intervals:
                index[interval.name].append((interval, shard))
        for pieces in index.values():
            pieces.sort(key=lambda piece: piece[0].start)
        return dict(index)


class _RowCounts(BaseModel, extra="forbid", strict=True):
    qkv: Dimension
    output: Dimension
    ffn: Dimension


class _Resizing(BaseModel, extra="allow"):
    """What a run goes by in an entry of the history; the rest is for readers."""

    kind: Literal["growth", "shrink", "net2net", "import"] = "growth"
    tokens_before: _RowCounts | None = None


class _Told(BaseModel):
    history: list[_Resizing]


_STORED_SHARDS = TypeAdapter(list[dict[str, Any]])
_STORED_INTERVALS = TypeAdapter(list[tuple[str, StrictInt, StrictInt]])
_MANIFEST = TypeAdapter(Manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of one checkpoint.

    Raises:
        UserError: no manifest, not JSON, another version, values of other types, shard names that leave the
            folder, sizes that are not the files', or intervals that overlap, leave gaps or exceed their
            tensor or their shard.
    """
    path = folder / MANIFEST
    try:
        stored = read_json(path, MANIFEST_BYTES)
        version = stored["version"]
        if version != FORMAT_VERSION:
            found = printable(version)
            raise UserError(f"{path} has format version {found}; this program reads {FORMAT_VERSION}", 1)
        # The lists first: pydantic takes what is an instance already as it is.
        shards = [
            Shard(str(s["file"]), int(s["size"]), str(s["hash"]), _intervals(s["intervals"]))
            for s in _STORED_SHARDS.validate_python(stored["shards"])
        ]
        _Told.model_validate({"history": stored.get("history", [])})
        manifest = _MANIFEST.validate_python({**stored, "shards": shards})
        _check_structure(manifest)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", 1) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = printable(".".join(map(str, first["loc"])))
        raise UserError(f"{path} is damaged: {key}: {first['msg']}", 1) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged: {printable(error)}", 1) from None
    _check_files(folder, manifest)
    return manifest


def read_json(path: Path, most: int) -> Any:
    """Read a file of JSON that may be anyone's.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file, has more than `most` bytes, or is not JSON.
    """
    return parse_json(read_small(path, most))


def parse_json(text: bytes) -> Any:
    """What JSON that may be anyone's says.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_small(path: Path, most: int) -> bytes:
    """Read a file that is known to be small.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file, or has more than `most` bytes.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, for ever
        raise ValueError("it is not a file")
    if found.st_size > most:
        raise ValueError(f"it has {found.st_size} bytes, more than {most}")
    return path.read_bytes()


def _finite(text: str) -> float:
    """JSON has no NaN and no infinity, but Python reads them, and makes one of 1e999."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _intervals(stored: Any) -> list[Interval]:
    return [Interval(*interval) for interval in _STORED_INTERVALS.validate_python(stored)]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest durably; the caller has written and fsynced all shards before."""
    head = asdict(replace(manifest, shards=[]))
    del head["shards"]
    # A line for each shard, by the encoder in C: training waits for Python's while it runs, and of thousands
    # of shards that is seconds.
    shards = ",\n".join(json.dumps(_stored(shard)) for shard in manifest.shards)
    text = json.dumps(_without_nan(head), indent=1, allow_nan=False).removesuffix("\n}")
    write_durably(folder / MANIFEST, f'{text},\n "shards": [\n{shards}\n]\n}}\n')


def _stored(shard: Shard) -> dict[str, Any]:
    intervals = [(interval.name, interval.start, interval.stop) for interval in shard.intervals]
    return {"file": shard.file, "size": shard.size, "hash": shard.hash, "intervals": intervals}


def _without_nan(value: Any) -> Any:
    """The same with null for the losses and norms of a run that has diverged, which JSON cannot tell."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_structure(manifest: Manifest) -> None:
    sections = ("model", "data", "optimizer", "training")
    if any(not isinstance(manifest.config.get(key, {}), dict) for key in sections):
        raise ValueError("a section of its config is not a mapping")
    dense = manifest.config.get("model", {}).get("architecture") == "transformer"
    roles = set() if dense else {"qkv", "output", "ffn"}
    for kind, needed in (("taus", roles), ("totals", {"tokens", "flops"})):
        missing = needed - getattr(manifest, kind).keys()
        if missing:
            raise ValueError(f"{kind} lack {', '.join(sorted(missing))}")
    if any(tau.keys() != {"start", "end", "steps"} for tau in manifest.taus.values()):
        raise ValueError("a tau lacks its start, end or steps")
    if min(manifest.totals.values()) < 0:
        raise ValueError(f"totals are {manifest.totals}")
    if manifest.states not in ([WEIGHT], list(STATES)):
        raise ValueError(f"states are {manifest.states}")
    _check_names(manifest)
    _check_cover(manifest)
    for shard in manifest.shards:
        elements = sum(interval.stop - interval.start for interval in shard.intervals)
        if shard.size < 4 * len(manifest.states) * elements:
            raise ValueError(f"{shard.file} of {shard.size} bytes cannot hold its {elements} elements")


def _check_names(manifest: Manifest) -> None:
    names = set()
    for shard in manifest.shards:
        # Of this form it is in the folder, is not the manifest, and says nothing to a terminal.
        if not _SHARD_NAME.fullmatch(shard.file) or len(shard.file) > 255:
            raise ValueError(f"shard name {shard.file!r} is not a plain file name of a .safetensors")
        if shard.file in names:
            raise ValueError(f"two shards are called {shard.file}")
        names.add(shard.file)
    for name in manifest.shapes:
        if not _TENSOR_NAME.fullmatch(name):
            raise ValueError(f"tensor name {name!r} has other characters than a parameter's")


def _check_cover(manifest: Manifest) -> None:
    """Every tensor's intervals follow each other from its first element to its last."""
    unknown = manifest.index.keys() - manifest.shapes.keys()
    if unknown:
        raise ValueError(f"intervals of an unknown tensor {min(unknown)!r}")
    for name, shape in manifest.shapes.items():
        end = 0
        for interval, shard in manifest.index.get(name, ()):
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
            found = path.stat()
        except OSError as error:
            raise UserError(f"checkpoint shard {path}: {error.strerror}", 1) from None
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"checkpoint shard {path} is not a file", 1)
        if found.st_size != shard.size:
            raise UserError(
                f"checkpoint shard {path} has {found.st_size} bytes, its manifest says {shard.size}", 1
            )
