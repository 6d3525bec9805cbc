"""Look through a dataset: count it, and hold index, tokens and description against each other.

Everything is read part by part, so memory does not grow with the data, and nothing is believed: the pair may
be anyone's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_tokenformer.data.index_layout import HEADER, Index, document_lengths, parts, read_index
from megatron_tokenformer.data.lengths import LengthCounts
from megatron_tokenformer.data.pair import require_pair
from megatron_tokenformer.data.sidecar import read_sidecar, sidecar_path
from megatron_tokenformer.errors import UserError

_TOKENS = 2 << 20


@dataclass(frozen=True)
class Damage:
    """One kind of damage: where it is met first, and how often in all."""

    file: str
    """its path"""
    position: str
    """where in it, e.g. `byte 34`; empty if it is the file as a whole"""
    problem: str
    """what is wrong, in words"""
    count: int = 1
    """how many places have it"""

    def __str__(self) -> str:
        where = f"{self.file}, {self.position}" if self.position else self.file
        more = f" (and {self.count - 1:,} more of the kind)" if self.count > 1 else ""
        return f"{where}: {self.problem}{more}"


@dataclass
class Inspection:
    """What was found in a dataset."""

    prefix: str
    """its name"""
    index: Index | None = None
    """where its documents lie; None if not even that can be read"""
    sidecar: dict[str, Any] | None = None
    """its description, if it has one"""
    tokens: int = 0
    """ids in the `.bin`, by its size"""
    bytes: int = 0
    """of both files"""
    lengths: LengthCounts = field(default_factory=LengthCounts)
    """of the documents; empty if the index is damaged"""
    vocab_size: int | None = None
    """what the ids were held against; None if nothing is known"""
    largest_id: int | None = None
    """in the `.bin`; None if it was not read, or is empty"""
    damages: list[Damage] = field(default_factory=list)
    """all that is wrong, one entry for each kind"""

    def tell(self, file: str, position: str, problem: str, count: int = 1) -> None:
        """Note a kind of damage."""
        self.damages.append(Damage(file, position, problem, count))


def inspect_dataset(
    prefix: str, *, vocab_size: int | None = None, read_tokens: bool = True, log_interval: float = 1.0
) -> Inspection:
    """Count and verify a dataset.

    Args:
        prefix: the pair's name without `.bin`.
        vocab_size: ids must be below it; by default the description's, else they must not be negative.
        read_tokens: read the `.bin` too; without, only its size is held against the index.
        log_interval: seconds between updates of the progress bar.

    Returns:
        What was found; damage is part of it, not an error.

    Raises:
        UserError: there is no such dataset, or it cannot be read.
    """
    bin_path, idx_path = require_pair(prefix)
    found = Inspection(prefix, bytes=os.path.getsize(bin_path) + os.path.getsize(idx_path))
    try:
        _read_description(found, vocab_size)
        try:
            found.index = read_index(idx_path)
        except UserError as error:
            # The header says where everything else is: there is nothing to go on with.
            found.tell(idx_path, "header", str(error).removeprefix(f"{idx_path} "))
            return found
        found.tokens = os.path.getsize(bin_path) // found.index.dtype.itemsize
        with tqdm(
            total=(found.bytes if read_tokens else found.index.bytes) - HEADER.size,
            unit="B",
            unit_scale=True,
            mininterval=log_interval,
            desc="verify",
        ) as bar:
            _check_sequences(found, found.index, bin_path, bar.update)
            _check_boundaries(found, found.index, bar.update)
            _check_counts(found, found.index)
            if not any(damage.file == idx_path for damage in found.damages):
                for lengths in document_lengths(found.index):
                    found.lengths.add(lengths)
            if read_tokens:
                _check_tokens(found, found.index, bin_path, bar.update)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or prefix}: {error.strerror}", exit_code=1) from error
    return found


def _read_description(found: Inspection, vocab_size: int | None) -> None:
    try:
        found.sidecar = read_sidecar(found.prefix)
    except UserError as error:
        path = sidecar_path(found.prefix)
        found.tell(path, "", str(error).removeprefix(f"{path} is damaged: "))
    found.vocab_size = vocab_size
    if vocab_size is None and found.sidecar is not None:
        found.vocab_size = found.sidecar["tokenizer"]["vocab_size"]


def _check_sequences(found: Inspection, index: Index, bin_path: str, report: Callable[[int], object]) -> None:
    """No length is negative, each pointer is where the sequences before it end, the last ends the .bin."""
    end, negative, astray = 0, _First(), _First()
    for start, count in parts(index.sequences):
        lengths, pointers = index.lengths(start, count), index.pointers(start, count)
        negative.look(start, lengths < 0, lengths)
        ends = end + np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
        expected = np.concatenate(([end], ends[:-1]))
        astray.look(start, pointers != expected, pointers, expected)
        end = int(ends[-1])
        report(12 * count)
    if negative.count:
        problem = f"sequence {negative.place:,} has the length {negative.value}"
        found.tell(index.path, f"byte {HEADER.size + 4 * negative.place}", problem, negative.count)
    if astray.count:
        problem = (
            f"the pointer of sequence {astray.place:,} is {astray.value}, "
            f"but the sequences before it end at {astray.expected}"
        )
        found.tell(index.path, f"byte {index.pointers_at + 8 * astray.place}", problem, astray.count)
    size = os.path.getsize(bin_path)
    if size != end:
        problem = f"the file has {size} bytes, but the lengths in {index.path} add up to {end}"
        found.tell(bin_path, f"byte {max(min(size, end), 0)}", problem)


def _check_boundaries(found: Inspection, index: Index, report: Callable[[int], object]) -> None:
    """Boundaries begin at 0, never fall, and end at the number of sequences."""
    before, falling = 0, _First()
    for start, count in parts(index.documents + 1):
        boundaries = index.boundaries(start, count)
        if start == 0 and boundaries[0] != 0:
            problem = f"the first document begins at sequence {boundaries[0]}, not at 0"
            found.tell(index.path, f"byte {index.boundaries_at}", problem)
            before = int(boundaries[0])
        previous = np.concatenate(([before], boundaries[:-1]))
        falling.look(start, boundaries < previous, boundaries, previous)
        before = int(boundaries[-1])
        report(8 * count)
    if falling.count:
        problem = f"document boundary {falling.place:,} is {falling.value}, after one of {falling.expected}"
        found.tell(index.path, f"byte {index.boundaries_at + 8 * falling.place}", problem, falling.count)
    if before != index.sequences:
        problem = f"the last document ends at sequence {before} of {index.sequences}"
        found.tell(index.path, f"byte {index.boundaries_at + 8 * index.documents}", problem)


def _check_counts(found: Inspection, index: Index) -> None:
    """The description counts what is there."""
    if found.sidecar is None:
        return
    there = {"documents": index.documents, "tokens": found.tokens, "dtype": str(index.dtype)}
    for key, value in there.items():
        if found.sidecar.get(key, value) != value:
            problem = f"says {found.sidecar[key]}, but the pair has {value}"
            found.tell(sidecar_path(found.prefix), f"key {key!r}", problem)


def _check_tokens(found: Inspection, index: Index, path: str, report: Callable[[int], object]) -> None:
    """No id is negative, or not of the vocabulary."""
    limit = found.vocab_size if found.vocab_size is not None else np.iinfo(index.dtype).max + 1
    start, outside = 0, _First()
    with open(path, "rb") as file:
        while (ids := np.fromfile(file, index.dtype, _TOKENS)).size:
            least, most = int(ids.min()), int(ids.max())
            # Two quick looks at each block; only a bad one is searched.
            if least < 0 or most >= limit:
                outside.look(start, (ids < 0) | (ids >= limit), ids)
            found.largest_id = max(most, found.largest_id or 0)
            start += ids.size
            report(ids.nbytes)
    if outside.count:
        vocabulary = f"a vocabulary of {limit}" if found.vocab_size is not None else "any vocabulary"
        problem = f"token {outside.place:,} has the id {outside.value}, outside of {vocabulary}"
        found.tell(path, f"byte {outside.place * index.dtype.itemsize}", problem, outside.count)


class _First:
    """The first place where something is wrong, what is there and what should be, and how many there are."""

    def __init__(self) -> None:
        self.place, self.value, self.expected, self.count = 0, 0, 0, 0

    def look(
        self, start: int, wrong: np.ndarray, values: np.ndarray, expected: np.ndarray | None = None
    ) -> None:
        """Look at the places from `start` on; all arrays are [n]."""
        count = int(np.count_nonzero(wrong))
        if count and not self.count:
            first = int(np.argmax(wrong))
            self.place, self.value = start + first, int(values[first])
            self.expected = int(expected[first]) if expected is not None else 0
        self.count += count
