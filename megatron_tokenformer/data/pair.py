"""Opening a pair (``PREFIX.bin``, ``PREFIX.idx``): what can be checked in the same time at any size.

Training and merging open their data here. What takes reading all of it is ``inspection``'s.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from megatron_tokenformer.data.index_layout import Index, read_index
from megatron_tokenformer.data.sidecar import read_sidecar, sidecar_path
from megatron_tokenformer.errors import UserError

EDGE_BYTES = 64 << 10


class Stamp(NamedTuple):
    """What tells a file from one that it was replaced by or rewritten to, without reading it."""

    bytes: int
    modified_ns: int
    inode: int


@dataclass(frozen=True)
class Pair:
    """A pair whose ends are sound.

    Attributes:
        prefix: its name without ``.bin``.
        index: where its documents lie.
        sidecar: its description, if it has one.
        stamps: of the ``.bin`` and the ``.idx``, from before anything was read.
    """

    prefix: str
    index: Index
    sidecar: dict[str, Any] | None
    stamps: tuple[Stamp, Stamp]

    @property
    def token_bytes(self) -> int:
        """The size of the ``.bin``."""
        return self.stamps[0].bytes

    @property
    def tokens(self) -> int:
        """Ids in the ``.bin``."""
        return self.token_bytes // self.index.dtype.itemsize

    def check_unchanged(self) -> None:
        """Compare both files with what they were when the pair was opened: one stat each.

        Raises:
            UserError: one was replaced, rewritten or removed (exit code 1).
        """
        for path, before in zip(pair_paths(self.prefix), self.stamps):
            try:
                now = _stamp(path)
            except OSError as error:
                raise self._changed(f"{path}: {error.strerror}") from error
            if now.inode != before.inode:
                raise self._changed(f"{path} is another file now")
            if now.bytes != before.bytes:
                raise self._changed(f"{path} had {before.bytes} bytes and has {now.bytes}")
            if now.modified_ns != before.modified_ns:
                raise self._changed(f"{path} was written to")

    def _changed(self, how: str) -> UserError:
        return UserError(
            f"{self.prefix} was changed or replaced while the run was reading it ({how}); "
            "leave data alone while a run reads them",
            exit_code=1,
        )


class Identity(NamedTuple):
    """What two copies of a dataset have in common: counts, and a hash of the ends of both files."""

    documents: int
    tokens: int
    digest: str


def open_pair(prefix: str) -> Pair:
    """Open a pair: header, sizes, first and last entries of the tables, and the description's counts.

    Raises:
        UserError: a file is missing (exit code 2), cannot be read, or they contradict each other (1).
    """
    bin_path, idx_path = require_pair(prefix)
    try:
        stamps = _stamp(bin_path), _stamp(idx_path)
        try:
            index = read_index(idx_path)
        except UserError as error:
            raise _damaged(prefix, str(error)) from None
        _check_ends(prefix, index, stamps[0].bytes)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or prefix}: {error.strerror}", exit_code=1) from error
    pair = Pair(prefix, index, read_sidecar(prefix), stamps)
    _check_description(pair)
    return pair


def identify(pair: Pair) -> Identity:
    """The identity of a pair, from 64 KiB at each end of each file.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for path in pair_paths(pair.prefix):
            with open(path, "rb", buffering=0) as file:
                for edge in _edges(file):
                    digest.update(edge)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", exit_code=1) from error
    return Identity(pair.index.documents, pair.tokens, digest.hexdigest())


def pair_paths(prefix: str) -> tuple[str, str]:
    """The names of the two files of ``prefix``: ``.bin``, ``.idx``."""
    return f"{prefix}.bin", f"{prefix}.idx"


def require_pair(prefix: str) -> tuple[str, str]:
    """The names of the two files of ``prefix``, which exist.

    Raises:
        UserError: one is missing; with a guess at what was meant.
    """
    for path in pair_paths(prefix):
        if not os.path.isfile(path):
            raise UserError(f"no data at {prefix!r}: {path} is missing{_hint(prefix)}")
    return pair_paths(prefix)


def _stamp(path: str) -> Stamp:
    found = os.stat(path)
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino)


def _check_ends(prefix: str, index: Index, size: int) -> None:
    """Pointers and boundaries begin at 0, the last boundary is the last sequence's, which ends the .bin."""
    bin_path = pair_paths(prefix)[0]
    first = int(index.pointers(0, 1)[0]) if index.sequences else 0
    if first != 0:
        raise _damaged(prefix, f"in {index.path} the pointer of the first sequence is {first}, not 0")
    first, last = (int(index.boundaries(document, 1)[0]) for document in (0, index.documents))
    if first != 0:
        raise _damaged(prefix, f"in {index.path} the first document begins at sequence {first}, not at 0")
    if last != index.sequences:
        raise _damaged(
            prefix, f"in {index.path} the last document ends at sequence {last} of {index.sequences}"
        )
    needed = index.token_bytes()
    if size != needed:
        raise _damaged(
            prefix,
            f"{bin_path} has {size} bytes, but its index {index.path} describes {needed}: "
            "the file is cut short, still being written, or belongs to another index",
        )
    if size % index.dtype.itemsize:
        raise _damaged(prefix, f"{bin_path} has {size} bytes, not a whole number of {index.dtype} ids")


def _check_description(pair: Pair) -> None:
    if pair.sidecar is None:
        return
    there = {"documents": pair.index.documents, "tokens": pair.tokens, "dtype": str(pair.index.dtype)}
    for name, value in there.items():
        if pair.sidecar.get(name, value) != value:
            path = sidecar_path(pair.prefix)
            raise _damaged(
                pair.prefix,
                f"{path} describes other data: it says {name} {pair.sidecar[name]}, the pair has {value}",
            )


def _damaged(prefix: str, how: str) -> UserError:
    return UserError(
        f"{prefix} is damaged: {how}; `tokenformer inspect_dataset {prefix}` tells all that is wrong",
        exit_code=1,
    )


def _edges(file: BinaryIO) -> tuple[bytes, bytes]:
    """The first and the last bytes of a file; those of a short one twice in part."""
    first = file.read(EDGE_BYTES)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - EDGE_BYTES))
    return first, file.read(EDGE_BYTES)


def _hint(prefix: str) -> str:
    for guess in (f"{prefix}_text_document", prefix.removesuffix(".bin"), prefix.removesuffix(".idx")):
        if guess != prefix and os.path.isfile(f"{guess}.idx"):
            return f"; did you mean {guess!r}?"
    return ""
