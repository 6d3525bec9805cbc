"""Shard files: safetensors holding fp32 intervals, written as a stream and read by slice.

The safetensors library writes only tensors that are all in memory; growth writes files larger than that, so
the writer here declares its entries first and then takes their bytes in order.  Reading is the library's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from megatron_tokenformer.checkpoint.manifest import Interval, Manifest, Shard, parse_json, read_manifest
from megatron_tokenformer.errors import UserError

BLOCK_ELEMENTS = 4 * 1024 * 1024
MAPPED_ELEMENTS = 2 * BLOCK_ELEMENTS
COPY_BYTES = 1024 * 1024
HEADER_BYTES = 100_000_000
"""as many as safetensors itself takes"""


def write_shard(path: Path, intervals: list[Interval], states: list[str], data: Iterable[Tensor]) -> Shard:
    """Write a shard: for each interval in turn, its states in the order given.

    Args:
        data: the elements, fp32, in that order; cut into pieces anywhere.

    Raises:
        ValueError: `data` has more or fewer elements than the intervals.
    """
    header: dict[str, object] = {}
    offset = 0
    for interval in intervals:
        for state in states:
            end = offset + 4 * (interval.stop - interval.start)
            header[interval.key(state)] = {
                "dtype": "F32",
                "shape": [interval.stop - interval.start],
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, written = xxhash.xxh3_128(), 0
    with open(path, "xb", buffering=0) as file:  # x: a shard may be linked into other checkpoints
        start = len(text).to_bytes(8, "little") + text
        digest.update(start)
        _write_all(file, memoryview(start))
        for piece in data:
            block = piece.detach().to("cpu", torch.float32).contiguous().numpy().data.cast("B")
            digest.update(block)
            _write_all(file, block)
            written += len(block)
        if written != offset:
            raise ValueError(f"{path}: {written} bytes for intervals of {offset}")
        os.fsync(file.fileno())
    return Shard(path.name, 8 + len(text) + offset, digest.hexdigest(), intervals)


def _write_all(file: FileIO, block: memoryview) -> None:
    """A raw file writes at most 2 GB at once."""
    while block:
        block = block[file.write(block) :]


class IntervalReader:
    """Reads any interval of any tensor of a checkpoint, from whichever shards hold it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._open: dict[str, safe_open] = {}
        self._mapped = 0

    def read(self, wanted: Interval, state: str) -> Iterator[tuple[int, Tensor]]:
        """Pieces of at most BLOCK_ELEMENTS of one state, as (first element, fp32 values), in order.

        Raises:
            UserError: a shard that is not what the manifest says, or elements that no shard has.
        """
        at = wanted.start
        for shard, stored in self.manifest.locate(wanted):
            start, stop = max(wanted.start, stored.start), min(wanted.stop, stored.stop)
            for first in range(start, stop, BLOCK_ELEMENTS):
                last = min(first + BLOCK_ELEMENTS, stop)
                yield first, self._slice(shard, stored, state, first, last)
            at = stop
        if at != wanted.stop:
            raise UserError(f"checkpoint {self.folder} has no element {at} of {wanted.name}", 1)

    def _slice(self, shard: Shard, stored: Interval, state: str, first: int, last: int) -> Tensor:
        # Files are mapped, and what was read of them counts as this process's memory while they are open.
        self._mapped += last - first
        if self._mapped > MAPPED_ELEMENTS:
            self._open.clear()
            self._mapped = last - first
        try:
            if shard.file not in self._open:
                self._open[shard.file] = safe_open(self.folder / shard.file, framework="pt")
            values = self._open[shard.file].get_slice(stored.key(state))
            if values.get_shape() != [stored.stop - stored.start] or values.get_dtype() != "F32":
                raise SafetensorError("its entry has another size than the manifest says")
            return values[first - stored.start : last - stored.start]
        except (SafetensorError, OSError) as error:
            place = f"{self.folder / shard.file}, {stored.key(state)}"
            raise UserError(f"checkpoint shard {place}: {error}", 1) from None


def check_header(path: Path, shard: Shard, states: list[str]) -> dict[str, int]:
    """Hold a shard's own header against the manifest, be it that their hash is right.

    Args:
        states: that the manifest says are stored.

    Returns:
        The byte of the file at which each entry begins, by its name.

    Raises:
        UserError: the shard cannot be read, or has another header than one of just these entries, in fp32,
            that fill the file one after the other.
    """
    sizes = {part.key(state): 4 * (part.stop - part.start) for part in shard.intervals for state in states}
    room = shard.size - 8 - sum(sizes.values())
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length != room or length > HEADER_BYTES or length % 4:
                raise ValueError(f"it has {length} bytes, not {room}, a multiple of 4 up to {HEADER_BYTES}")
            starts = _entries(parse_json(file.read(length)), sizes)
    except OSError as error:
        raise UserError(f"checkpoint shard {path}: {error.strerror}", exit_code=1) from None
    except ValueError as error:
        raise UserError(f"checkpoint shard {path} is damaged: its header: {error}", exit_code=1) from None
    return {key: 8 + length + start for key, start in starts.items()}


def _entries(header: Any, sizes: dict[str, int]) -> dict[str, int]:
    """Where in the numbers each entry begins."""
    if not isinstance(header, dict):
        raise ValueError("it is not a JSON object")
    header.pop("__metadata__", None)  # safetensors lets everyone put one in
    if header.keys() != sizes.keys():
        raise ValueError(f"only one of it and the manifest has {min(header.keys() ^ sizes.keys())!r}")
    starts: dict[str, int] = {}
    for key, size in sizes.items():
        entry = header[key]
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        start = offsets[0] if isinstance(offsets, list) and offsets else None
        wanted = {"dtype": "F32", "shape": [size // 4], "data_offsets": [start, (start or 0) + size]}
        if type(start) is not int or entry != wanted:
            raise ValueError(f"it has another type, shape or size of {key} than the manifest")
        starts[key] = start
    end = 0
    for start, key in sorted((start, key) for key, start in starts.items()):
        if start != end:
            raise ValueError(f"{key} does not begin where the entry before it ends")
        end += sizes[key]
    return starts


def copy_shard(
    source: Path,
    shard: Shard,
    states: list[str],
    folder: Path,
    tell: Callable[[int], object],
    look: Callable[[memoryview], object] | None = None,
) -> None:
    """Copy a shard durably into another folder, checking its hash and its header on the way.

    Args:
        states: that the manifest says are stored.
        tell: called with the number of bytes of each block, for a progress bar.
        look: called with each block, valid during the call.

    Raises:
        UserError: see `verify_shard`.
    """
    with open(folder / shard.file, "xb", buffering=0) as file:

        def take(block: memoryview) -> None:
            _write_all(file, block)
            if look is not None:
                look(block)

        verify_shard(source, shard, states, tell, take)
        os.fsync(file.fileno())


def verify_shard(
    source: Path,
    shard: Shard,
    states: list[str],
    tell: Callable[[int], object],
    look: Callable[[memoryview], object] | None = None,
) -> None:
    """Read a shard whole and check its hash, and its header.

    Args:
        states: as for `copy_shard`, and so `tell` and `look`.

    Raises:
        UserError: the shard's bytes are not those that its hash was made of, or what they are is not what the
            manifest says.
    """
    digest = xxhash.xxh3_128()
    for block in _blocks(source / shard.file):
        digest.update(block)
        if look is not None:
            look(block)
        tell(len(block))
    if digest.hexdigest() != shard.hash:
        path = source / shard.file
        raise UserError(f"checkpoint shard {path} is damaged: its hash is not the manifest's", exit_code=1)
    check_header(source / shard.file, shard, states)


def drop_from_cache(path: Path) -> None:
    """Forget a durable file's pages, so that the next read is from the disk."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def verify_checkpoint(folder: Path) -> Manifest:
    """Read a checkpoint whole, its manifest and all shards against their hashes; return the manifest.

    Raises:
        UserError: names the first file that is not what it was, and why.
    """
    manifest = read_manifest(folder)
    for error in damaged_shards(folder, manifest):
        raise error
    return manifest


def damaged_shards(folder: Path, manifest: Manifest) -> Iterator[UserError]:
    """Read all shards, with a progress bar; for each that is not what it was, the error that says so."""
    total = sum(shard.size for shard in manifest.shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"verify {folder.name}", disable=None) as bar:
        for shard in manifest.shards:
            try:
                verify_shard(folder, shard, manifest.states, bar.update)
            except UserError as error:
                yield error


def _blocks(path: Path) -> Iterator[memoryview]:
    """The bytes of a shard in blocks, each valid until the next is asked for."""
    # One buffer that fits the cache, for all blocks: with a new one for each, copying is three times slower.
    buffer = memoryview(bytearray(COPY_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                yield buffer[:size]
    except OSError as error:
        raise UserError(f"checkpoint shard {path}: {error.strerror}", exit_code=1) from None
