"""Opening a pair (`PREFIX.bin`, `PREFIX.idx`): what can be checked in the same time at any size.

Training and merging open their data here.  What takes reading all of it is `inspection`'s.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_tokenformer.data.index_layout import Index, read_index
from megatron_tokenformer.data.sidecar import read_sidecar, sidecar_path
from megatron_tokenformer.errors import UserError

EDGE_BYTES = 64 << 10


class Stamp(NamedTuple):
    """What tells a file from one that it was replaced by or rewritten to, without reading it."""

    bytes: int
    modified_ns: int
    inode: int


class Identity(NamedTuple):
    """What two copies of a dataset have in common: counts, and hashes of the ends of both files."""

    documents: int
    tokens: int
    digests: tuple[str, str]


@dataclass(frozen=True)
class Pair:
    """A pair whose ends are sound."""

    prefix: str
    """its name without `.bin`"""
    index: Index
    """where its documents lie"""
    sidecar: dict[str, Any] | None
    """its description, if it has one"""
    stamps: tuple[Stamp, Stamp]
    """of the `.bin` and the `.idx`, from before anything was read"""
    digests: tuple[str, str]
    """of 64 KiB at each end of the `.bin`, and of the `.idx`, when it was opened"""
    _unanswered: set[str] = field(default_factory=set)
    """files that could not be looked at again, of which a warning told"""

    @property
    def token_bytes(self) -> int:
        """The size of the `.bin`."""
        return self.stamps[0].bytes

    @property
    def tokens(self) -> int:
        """Ids in the `.bin`."""
        return self.token_bytes // self.index.dtype.itemsize

    @property
    def identity(self) -> Identity:
        """What tells it from a copy that differs."""
        return Identity(self.index.documents, self.tokens, self.digests)

    def check_unchanged(self) -> None:
        """Compare both files with what they were when the pair was opened: one stat each.

        Only where a file has another inode, with the same size and time, its ends are read: a network's file
        system may give a path another one at any time, and a copy may have taken its place.  Where a file
        system fails to answer, a warning on standard error says so, once a file; the next call asks again.

        Raises:
            UserError: one was replaced, rewritten or removed (exit code 1).
        """
        for path, stamp, digest in zip(pair_paths(self.prefix), self.stamps, self.digests):
            try:
                self._check_file(path, stamp, digest)
            except FileNotFoundError as error:
                raise self._changed(f"{path}: {error.strerror}") from error
            except OSError as error:
                if path not in self._unanswered:
                    self._unanswered.add(path)
                    why = f"whether it was changed cannot be told now ({error.strerror})"
                    print(f"warning: {path}: {why}", file=sys.stderr, flush=True)

    def _check_file(self, path: str, before: Stamp, digest: str) -> None:
        now = _stamp(path)
        if now.inode != before.inode:
            alike = now._replace(inode=before.inode) == before
            if not alike or _digest(path) != digest:
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


def open_pair(prefix: str) -> Pair:
    """Open a pair: header, sizes, first and last entries of the tables, and the description's counts.

    Raises:
        UserError: a file is missing (exit code 2), cannot be read, or they contradict each other (1).
    """
    bin_path, idx_path = require_pair(prefix)
    try:
        stamps = _stamp(bin_path), _stamp(idx_path)
        digests = _digest(bin_path), _digest(idx_path)
        try:
            index = read_index(idx_path)
        except UserError as error:
            raise _damaged(prefix, str(error)) from None
        _check_ends(prefix, index, stamps[0].bytes)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or prefix}: {error.strerror}", exit_code=1) from error
    pair = Pair(prefix, index, read_sidecar(prefix), stamps, digests)
    _check_description(pair)
    return pair


def pair_paths(prefix: str) -> tuple[str, str]:
    """The names of the two files of `prefix`: `.bin`, `.idx`."""
    return f"{prefix}.bin", f"{prefix}.idx"


def require_pair(prefix: str) -> tuple[str, str]:
    """The names of the two files of `prefix`, which exist.

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


def _digest(path: str) -> str:
    """A hash of the first and the last bytes of a file; those of a short one count twice in part."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        digest.update(file.read(EDGE_BYTES))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - EDGE_BYTES))
        digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()


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


def _hint(prefix: str) -> str:
    for guess in (f"{prefix}_text_document", prefix.removesuffix(".bin"), prefix.removesuffix(".idx")):
        if guess != prefix and os.path.isfile(f"{guess}.idx"):
            return f"; did you mean {guess!r}?"
    return ""
