"""Look into a checkpoint, or a folder of them, without a model: what is there, and whether it is whole.

Needs no torch until hashes are read, so that looking takes tenths of a second.
"""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_tokenformer.checkpoint import store
from megatron_tokenformer.checkpoint.manifest import MANIFEST, Manifest, Shard, read_manifest
from megatron_tokenformer.errors import UserError

Kind = Literal["checkpoint", "incomplete", "unfinished save", "set aside", "half deleted"]

LEFTOVERS: dict[str, Kind] = {
    store.WRITING: "unfinished save",
    store.REPLACED: "set aside",
    store.DELETED: "half deleted",
}


@dataclass
class Inspection:
    """What was found of one checkpoint."""

    path: Path
    """its folder"""
    kind: Kind
    """`checkpoint` if it has a manifest; else what is known of it by its name"""
    time: str
    """when its manifest was written, or its folder last changed; UTC, ISO 8601"""
    bytes: int
    """of all files in it; some may be linked into other checkpoints too"""
    latest: bool = False
    """whether the folder's `latest` names it"""
    manifest: Manifest | None = None
    """None if there is none, or it is damaged; or the folder is waste, so that nobody looked"""
    damages: list[str] = field(default_factory=list)
    """all that is wrong, each with file and reason; none of an incomplete one, which is no damage"""
    hashes_read: bool = False
    """whether the shards were read, not only measured"""


@dataclass(frozen=True)
class TensorRow:
    """A parameter, or those of one role in all layers."""

    name: str
    shape: list[int]
    tensors: int
    """parameters of this name and shape"""
    parameters: int
    bytes: int
    """of weight and moments, as stored"""
    intervals: int
    """pieces that it is stored in"""


def inspect_path(path: Path, verify: bool = False) -> list[Inspection]:
    """Look at one checkpoint, or at all that saves have put into a folder or a run's folder.

    Args:
        verify: read the shards too, and compare their hashes.

    Returns:
        What was found, damage being part of it and no error: of a folder, the complete checkpoints by step,
        and then what is left of dead saves.

    Raises:
        UserError: nothing there is of a checkpoint.
    """
    if (path / MANIFEST).is_file():
        return [_inspect(path, verify)]
    for folder in (path, path / "checkpoints"):
        complete = store.complete_checkpoints(folder)
        others = [entry for entry in sorted(folder.iterdir()) if _kind(entry)] if folder.is_dir() else []
        found = []
        for entry in dict.fromkeys((*complete, *others)):
            with suppress(FileNotFoundError):  # a run that is alive deletes and renames
                found.append(_inspect(entry, verify))
        if found:
            return found
    raise UserError(f"no checkpoint at {path}: no {MANIFEST} there or in a step-* folder")


def _inspect(path: Path, verify: bool) -> Inspection:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    found = Inspection(path, _kind(path) or "incomplete", _time(path), size)
    found.latest = store.read_latest(path.parent) == path
    # What was set aside is still the only one of its step, until its successor has its name.
    spared = found.kind == "set aside" and not path.with_name(path.stem.removeprefix(".")).exists()
    if found.kind != "checkpoint" and not (spared and (path / MANIFEST).is_file()):
        return found
    try:
        found.manifest = read_manifest(path)
    except UserError as error:
        found.damages.append(str(error))
        return found
    if verify:
        from megatron_tokenformer.checkpoint.shards import damaged_shards  # torch takes a second

        found.damages.extend(map(str, damaged_shards(path, found.manifest)))
        found.hashes_read = True
    return found


def tensor_rows(manifest: Manifest, by_role: bool = True) -> list[TensorRow]:
    """What is stored of each tensor.

    Args:
        by_role: one row for all layers' tensors of one name and shape, `layers.*.ffn.key_tokens`.
    """
    rows: dict[tuple[str, tuple[int, ...]], Counter[str]] = {}
    for name, shape in manifest.shapes.items():
        shown = re.sub(r"^layers\.\d+\.", "layers.*.", name) if by_role else name
        pieces = len(manifest.index[name])
        sums = rows.setdefault((shown, tuple(shape)), Counter())
        sums.update(tensors=1, parameters=math.prod(shape), intervals=pieces)
    states = len(manifest.states)
    return [
        TensorRow(name, list(shape), bytes=4 * states * sums["parameters"], **sums)
        for (name, shape), sums in rows.items()
    ]


def count_parameters(manifest: Manifest) -> int:
    """Trained numbers of the model."""
    return sum(math.prod(shape) for shape in manifest.shapes.values())


def as_json(found: Inspection) -> dict[str, Any]:
    """What was found as one object; of the manifest all but the intervals."""
    told: dict[str, Any] = {
        "path": str(found.path),
        "kind": found.kind,
        "time": found.time,
        "bytes": found.bytes,
        "latest": found.latest,
        "hashes_verified": found.hashes_read,
        "damages": found.damages,
    }
    manifest = found.manifest
    if manifest is not None:
        told |= {
            key: value for key, value in vars(manifest).items() if key not in ("shapes", "shards", "index")
        }
        told["tokenizer"] = vars(manifest.tokenizer) if manifest.tokenizer else None
        told["parameters"] = count_parameters(manifest)
        told["tensors"] = [vars(row) for row in tensor_rows(manifest, by_role=False)]
        told["shards"] = [shard_as_json(shard) for shard in manifest.shards]
    return told


def shard_as_json(shard: Shard) -> dict[str, Any]:
    """A shard's name, bytes, hash, and how many intervals of how many tensors it holds."""
    tensors = len({interval.name for interval in shard.intervals})
    return {
        "file": shard.file,
        "bytes": shard.size,
        "hash": shard.hash,
        "intervals": len(shard.intervals),
        "tensors": tensors,
    }


def _kind(path: Path) -> Kind | None:
    """What a folder is; None if it has nothing of a checkpoint."""
    if path.name.startswith(".step-") and path.suffix in LEFTOVERS:
        return LEFTOVERS[path.suffix]
    if (path / MANIFEST).is_file():
        return "checkpoint"
    return "incomplete" if path.name.startswith("step-") and path.is_dir() else None


def _time(path: Path) -> str:
    manifest = path / MANIFEST
    changed = (manifest if manifest.is_file() else path).stat().st_mtime
    return datetime.datetime.fromtimestamp(changed, datetime.timezone.utc).isoformat(timespec="seconds")
