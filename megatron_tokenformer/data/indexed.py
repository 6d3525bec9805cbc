"""Megatron's token files: `PREFIX.bin` (bare token ids) and `PREFIX.idx` (where each document lies).

The index is described in `index_layout`.  Written here in the order of Megatron-LM's and GPT-NeoX's
preprocessing, one sequence a document unless told otherwise.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megatron_tokenformer.data.index_layout import CODES, HEADER, MAGIC, PART, document_lengths, parts
from megatron_tokenformer.data.pair import open_pair, pair_paths
from megatron_tokenformer.data.sidecar import discard_sidecar, publish_sidecar
from megatron_tokenformer.durable import sync_folder, try_lock
from megatron_tokenformer.errors import UserError


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that Megatron stores the ids of a vocabulary in: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


class TokenFileWriter:
    """Write a pair document by document, in constant memory, so that it is complete or not there.

    Everything goes to `PREFIX.bin.tmp` and `PREFIX.idx.tmp`; `finish` gives them their names.  As a
    context manager, leaving without `finish` removes them.  The bytes are those of megatron-core's
    `IndexedDatasetBuilder`.

    Args:
        prefix: the pair's name without `.bin`; its folder is made.
        dtype: the type of the ids on disk.
        resume: (tokens, documents) of an earlier writer's temporary files that are kept, after `sync`
            and one sequence a document; what it wrote later is cut off.

    Raises:
        UserError: another process is writing this pair (exit code 2); there is not what was to be kept (1).
    """

    def __init__(self, prefix: str, dtype: np.dtype, resume: tuple[int, int] = (0, 0)) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.tokens, self.documents = resume
        self.sequences = self.documents
        """these three: what was written so far"""
        self._temporary = [f"{path}.tmp" for path in pair_paths(prefix)]
        os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
        self._files = ExitStack()
        self._bin = self._open(0, self.tokens * self.dtype.itemsize, any(resume))
        self._idx = self._open(1, HEADER.size + 4 * self.sequences, any(resume))
        # The boundaries, from the first document on that is not just one sequence; before, they only count.
        self._boundaries: BinaryIO | None = None

    def add(self, tokens: np.ndarray, lengths: np.ndarray, sequences: np.ndarray | None = None) -> None:
        """Append documents.

        Args:
            tokens: [sum of lengths] integers, the documents one after another.
            lengths: [sequences] tokens in each sequence.
            sequences: [documents] sequences in each document; without it each sequence is a document.

        Raises:
            ValueError: the numbers do not add up, or an id does not fit the file's type.
        """
        if int(lengths.sum()) != tokens.size:
            raise ValueError(f"lengths add up to {int(lengths.sum())}, but there are {tokens.size} tokens")
        limits = np.iinfo(self.dtype)
        # Ids of the file's own type fit, and are not looked at.
        foreign = tokens.size and tokens.dtype != self.dtype
        if foreign and not (limits.min <= tokens.min() and tokens.max() <= limits.max):
            raise ValueError(f"token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype}")
        counts = np.ones(lengths.size, np.int64) if sequences is None else sequences
        if int(counts.sum()) != lengths.size:
            raise ValueError(f"documents of {int(counts.sum())} sequences, but {lengths.size} lengths")
        self.append_documents(self.sequences + np.cumsum(counts, dtype=np.int64))
        self.append_lengths(lengths)
        self.append_tokens(tokens.astype(self.dtype, copy=False))

    def append_tokens(self, tokens: np.ndarray) -> None:
        """Append [n] ids of the file's own type, whose sequences are told apart from them.

        With the two below, for who copies whole files: a document need not fit into memory.

        Raises:
            ValueError: ids of another type, which would be written as garbage.
        """
        if tokens.dtype != self.dtype:
            raise ValueError(f"{tokens.dtype} ids for a file of {self.dtype}")
        self._bin.write(np.ascontiguousarray(tokens).data)
        self.tokens += tokens.size

    def append_lengths(self, lengths: np.ndarray) -> None:
        """Append the lengths [n] in tokens of the next sequences."""
        self._idx.write(np.ascontiguousarray(lengths, dtype=np.int32).data)
        self.sequences += lengths.size

    def append_documents(self, ends: np.ndarray) -> None:
        """Append documents by their ends [n], counted in sequences from the beginning of the file."""
        plain = np.arange(self.documents + 1, self.documents + 1 + ends.size)
        if self._boundaries is None and not np.array_equal(ends, plain):
            folder = os.path.dirname(self.prefix) or "."
            self._boundaries = self._files.enter_context(tempfile.TemporaryFile(dir=folder))
            _write_range(self._boundaries, self.documents + 1)
        if self._boundaries is not None:
            self._boundaries.write(np.ascontiguousarray(ends, dtype=np.int64).data)
        self.documents += ends.size

    def finish(self) -> None:
        """Complete the pair and give it its name: `complete`, then `publish`."""
        self.complete()
        self.publish()

    def complete(self) -> None:
        """Complete the index, and make both files durable under their temporary names.

        Raises:
            ValueError: tokens or documents were appended that no sequence accounts for, or the reverse.
        """
        self._write_tables()
        self.sync()

    def publish(self) -> None:
        """Give the completed files their names: `publish_pair`."""
        publish_pair(self.prefix)
        self.close()

    def sync(self) -> None:
        """Make durable what was written so far."""
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Leave the temporary files as they are, for a later writer to resume."""
        # On a full disk closing tries to flush once more and fails; what counts was made durable before.
        with suppress(OSError):
            self._files.close()

    def discard(self) -> None:
        """Remove the temporary files, a description's too; nothing happens after `finish`."""
        self.close()
        discard_sidecar(self.prefix)
        for path in self._temporary:
            if os.path.exists(path):
                os.remove(path)

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _open(self, which: int, size: int, resume: bool) -> BinaryIO:
        """Open a temporary file to go on after its first `size` bytes, so that no other process does."""
        path = self._temporary[which]
        file = self._files.enter_context(open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b"))
        if not _lock(file, path):
            self.close()
            raise UserError(f"another process is writing {self.prefix}; give each its own output prefix")
        if resume and os.path.getsize(path) < size:
            self.close()
            raise UserError(f"{path} is shorter than an earlier run is known to have left it", exit_code=1)
        file.truncate(size)
        file.seek(size)
        return file

    def _write_tables(self) -> None:
        """Put pointers and boundaries behind the lengths, read back part by part, and fill in the header."""
        pointer = 0
        for start, count in parts(self.sequences, PART):
            self._idx.seek(HEADER.size + 4 * start)
            lengths = np.frombuffer(self._idx.read(4 * count), dtype=np.int32)
            ends = pointer + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            self._idx.seek(HEADER.size + 4 * self.sequences + 8 * start)
            self._idx.write(np.concatenate(([pointer], ends[:-1])).astype(np.int64).data)
            pointer = int(ends[-1])
        if pointer != self.tokens * self.dtype.itemsize:
            raise ValueError(f"lengths of {pointer} bytes in all, but {self.tokens} tokens were appended")
        self._idx.seek(HEADER.size + 12 * self.sequences)
        last = self._copy_boundaries()
        if last != self.sequences:
            raise ValueError(f"documents end at sequence {last} of {self.sequences}")
        self._idx.seek(0)
        code = CODES[self.dtype]
        self._idx.write(HEADER.pack(MAGIC, 1, code, self.sequences, self.documents + 1))

    def _copy_boundaries(self) -> int:
        """Write the boundaries to where the index stands, and return the last one."""
        if self._boundaries is None:
            _write_range(self._idx, self.documents + 1)
            return self.documents
        self._boundaries.seek(0)
        last = b""
        while block := self._boundaries.read(8 * PART):
            self._idx.write(block)
            last = block[-8:]
        return int.from_bytes(last, "little")


class TokenFile:
    """A pair, opened for reading in constant time, and checked as far as that goes (`pair.open_pair`).

    Raises:
        UserError: a file is missing (exit code 2), cannot be read, or they contradict each other (1).
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        """the pair's name without `.bin`"""
        self.pair = open_pair(prefix)
        """its index, description, and what tells whether it was changed since"""
        self.index, self.dtype = self.pair.index, self.pair.index.dtype
        self.documents = self.index.documents
        bin_path = pair_paths(prefix)[0]
        try:
            self._mapped = _map(bin_path)
        except OSError as error:
            raise UserError(f"cannot read {bin_path}: {error.strerror}", exit_code=1) from error
        content = self._mapped or b""
        self._stream = np.frombuffer(content, self.dtype, count=len(content) // self.dtype.itemsize)
        self.tokens = self._stream.size
        """ids in the whole stream"""

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens `[start, start + length)` of the stream: a read-only view [length] of the mapped file.

        Raises:
            ValueError: the window does not lie within the stream.
        """
        if start < 0 or length < 0 or start + length > self.tokens:
            raise ValueError(
                f"window [{start}, {start + length}) of {self.prefix}, which has {self.tokens} tokens"
            )
        return self._stream[start : start + length]

    def expect(self, start: int, length: int) -> None:
        """Have the system begin to read a window that `window` will be asked for; waits for nothing."""
        if self._mapped is None:
            return
        size = self.dtype.itemsize
        first = start * size // mmap.PAGESIZE * mmap.PAGESIZE
        with suppress(OSError):  # a hint, which the system need not take
            self._mapped.madvise(mmap.MADV_WILLNEED, first, (start + length) * size - first)

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, [documents] int64.  Reads the whole index: not for a run's start."""
        return np.concatenate([np.empty(0, np.int64), *document_lengths(self.index)])

    def first_document_lengths(self, count: int) -> np.ndarray:
        """Tokens of the first `count` documents, [at most count] int64, without reading all."""
        found = [np.empty(0, np.int64)]
        for lengths in document_lengths(self.index):
            if sum(part.size for part in found) >= count:
                break
            found.append(lengths)
        return np.concatenate(found)[:count]


def publish_pair(prefix: str) -> None:
    """Give completed temporary files their names, replacing an old pair; also goes on where it was killed.

    The old index goes first and the new one comes after its tokens: whenever the machine stops, no index ever
    stands beside another pair's.  An old description (`PREFIX.json`) goes with the pair it describes, and a
    new one, if it was written, comes last.
    """
    bin_path, idx_path = pair_paths(prefix)
    if os.path.exists(f"{bin_path}.tmp"):
        for old in (f"{prefix}.json", idx_path):
            if os.path.exists(old):
                os.remove(old)
                sync_folder(Path(idx_path).parent)
        os.replace(f"{bin_path}.tmp", bin_path)
    if os.path.exists(f"{idx_path}.tmp"):
        os.replace(f"{idx_path}.tmp", idx_path)
    publish_sidecar(prefix)
    sync_folder(Path(idx_path).parent)


def _map(path: str) -> mmap.mmap | None:
    if os.path.getsize(path) == 0:
        return None  # what holds nothing cannot be mapped
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        # Windows are read in a shuffled order: read-ahead would fetch megabytes for each few kilobytes.
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped


def _lock(file: BinaryIO, path: str) -> bool:
    """Whether this process alone has the file, and it is still the one of that name."""
    locked = try_lock(file.fileno())
    if not locked:
        return locked is None  # a file system without locks: there it is the user who must not start two
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


def _write_range(file: BinaryIO, count: int) -> None:
    """Write 0, 1, 2, ... as i64: the boundaries of documents of one sequence each."""
    for start, size in parts(count, PART):
        file.write(np.arange(start, start + size, dtype=np.int64).data)
