"""Megatron's token files: ``PREFIX.bin`` (bare token ids) and ``PREFIX.idx`` (where each document lies).

The index, little endian: magic ``MMIDIDX\\0\\0``, u64 version 1, u8 code of the token type, u64 sequences,
u64 document boundaries (documents + 1), then i32 sequence lengths, i64 byte pointers, i64 boundaries. Written
here with one sequence a document, as Megatron-LM's and GPT-NeoX's preprocessing do.
"""

from __future__ import annotations

import mmap
import os
import struct
from contextlib import ExitStack, suppress
from types import TracebackType

import numpy as np

from megatron_tokenformer.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_PART = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that Megatron stores the ids of a vocabulary in: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def pair_paths(prefix: str) -> tuple[str, str]:
    """The names of the two files of ``prefix``: ``.bin``, ``.idx``."""
    return f"{prefix}.bin", f"{prefix}.idx"


class TokenFileWriter:
    """Write a pair document by document, in constant memory, so that it is complete or not there.

    Everything goes to ``PREFIX.bin.tmp`` and ``PREFIX.idx.tmp``; :meth:`finish` gives them their names. As a
    context manager, leaving without :meth:`finish` removes them. The bytes are those of megatron-core's
    ``IndexedDatasetBuilder``.
    """

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self.tokens = 0
        self._temporary = [f"{path}.tmp" for path in pair_paths(prefix)]
        os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
        self._files = ExitStack()
        self._bin = self._files.enter_context(open(self._temporary[0], "wb"))
        self._idx = self._files.enter_context(open(self._temporary[1], "w+b"))
        self._idx.write(bytes(_HEADER.size))

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: ``[sum of lengths]`` integers, the documents one after another.
            lengths: ``[documents]`` tokens in each.

        Raises:
            ValueError: the lengths do not add up, or an id does not fit the file's type.
        """
        if int(lengths.sum()) != tokens.size:
            raise ValueError(f"lengths add up to {int(lengths.sum())}, but there are {tokens.size} tokens")
        limits = np.iinfo(self.dtype)
        # Ids of the file's own type fit, and are not looked at.
        foreign = tokens.size and tokens.dtype != self.dtype
        if foreign and not (limits.min <= tokens.min() and tokens.max() <= limits.max):
            raise ValueError(f"token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype}")
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._idx.write(np.ascontiguousarray(lengths, dtype=np.int32).data)
        self.documents += lengths.size
        self.tokens += tokens.size

    def finish(self) -> None:
        """Complete the index, make both files durable and give them their names, replacing an old pair.

        The old index goes first and the new one comes last: whenever the machine stops, no index ever stands
        beside another pair's tokens.
        """
        self._write_pointers()
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        bin_path, idx_path = pair_paths(self.prefix)
        if os.path.exists(idx_path):
            os.remove(idx_path)
            _sync_folder(idx_path)
        os.replace(self._temporary[0], bin_path)
        os.replace(self._temporary[1], idx_path)
        _sync_folder(idx_path)

    def discard(self) -> None:
        """Remove the temporary files; nothing happens after :meth:`finish`."""
        # On a full disk closing tries to flush once more and fails; the files are going anyway.
        with suppress(OSError):
            self._files.close()
        for path in self._temporary:
            if os.path.exists(path):
                os.remove(path)

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _write_pointers(self) -> None:
        """Put pointers and boundaries behind the lengths, read back part by part, and fill in the header."""
        pointer = 0
        for start in range(0, self.documents, _PART):
            count = min(_PART, self.documents - start)
            self._idx.seek(_HEADER.size + 4 * start)
            lengths = np.frombuffer(self._idx.read(4 * count), dtype=np.int32)
            ends = pointer + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            self._idx.seek(_HEADER.size + 4 * self.documents + 8 * start)
            self._idx.write(np.concatenate(([pointer], ends[:-1])).astype(np.int64).data)
            pointer = int(ends[-1])
        self._idx.seek(_HEADER.size + 12 * self.documents)
        for start in range(0, self.documents + 1, _PART):
            self._idx.write(np.arange(start, min(start + _PART, self.documents + 1), dtype=np.int64).data)
        self._idx.seek(0)
        code = _CODES[self.dtype]
        self._idx.write(_HEADER.pack(_MAGIC, 1, code, self.documents, self.documents + 1))


class TokenFile:
    """A pair, opened for reading in constant time: the header, one stat of each file, and the last document.

    Attributes:
        prefix: the pair's name without ``.bin``.
        tokens: ids in the whole stream.
        documents: documents in it.
        dtype: the type of the ids on disk.

    Raises:
        UserError: a file is missing, is of another kind, or the two do not belong together.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        bin_path, self._idx_path = pair_paths(prefix)
        for path in (bin_path, self._idx_path):
            if not os.path.isfile(path):
                raise UserError(f"no data at {prefix!r}: {path} is missing{_hint(prefix)}")
        try:
            code, self._sequences, boundaries, needed = _read_header(self._idx_path)
            size = os.stat(bin_path).st_size
            self._stream = _map_tokens(bin_path, np.dtype(_DTYPES[code]))
        except OSError as error:
            raise UserError(f"cannot read {error.filename or prefix}: {error.strerror}") from error
        self.dtype = self._stream.dtype
        self.documents = boundaries - 1
        if size != needed:
            raise UserError(
                f"{bin_path} has {size} bytes, but its index {self._idx_path} describes {needed}: "
                "the file is cut short, still being written, or belongs to another index"
            )
        self.tokens = self._stream.size

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens ``[start, start + length)`` of the stream: a read-only view ``[length]`` of the mapped file.

        Raises:
            ValueError: the window does not lie within the stream.
        """
        if start < 0 or length < 0 or start + length > self.tokens:
            raise ValueError(
                f"window [{start}, {start + length}) of {self.prefix}, which has {self.tokens} tokens"
            )
        return self._stream[start : start + length]

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, ``[documents]`` int64. Reads the whole index: not for a run's start."""
        lengths = np.fromfile(self._idx_path, np.int32, self._sequences, offset=_HEADER.size)
        boundaries_at = _HEADER.size + 12 * self._sequences
        boundaries = np.fromfile(self._idx_path, np.int64, self.documents + 1, offset=boundaries_at)
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        return np.diff(ends[boundaries])


def _read_header(path: str) -> tuple[int, int, int, int]:
    """Type code, sequences, document boundaries, and the bytes that ``.bin`` must have."""
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise UserError(f"{path} is not a Megatron index (its first bytes are not MMIDIDX)")
        _, version, code, sequences, boundaries = _HEADER.unpack(head)
        if version != 1:
            raise UserError(f"{path} has index version {version}; only version 1 is known")
        if code not in _DTYPES:
            raise UserError(f"{path} has the unknown token type code {code}")
        size, expected = os.fstat(file.fileno()).st_size, _HEADER.size + 12 * sequences + 8 * boundaries
        if size != expected or boundaries < 1:
            raise UserError(
                f"{path} has {size} bytes, but {sequences} sequences and {boundaries} document boundaries "
                f"need {expected}: the file is cut short or damaged"
            )
        if sequences == 0:
            return code, 0, boundaries, 0
        file.seek(_HEADER.size + 4 * (sequences - 1))
        (last_length,) = struct.unpack("<i", file.read(4))
        file.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
        (last_pointer,) = struct.unpack("<q", file.read(8))
    return code, sequences, boundaries, last_pointer + last_length * np.dtype(_DTYPES[code]).itemsize


def _map_tokens(path: str, dtype: np.dtype) -> np.ndarray:
    if os.path.getsize(path) == 0:
        return np.empty(0, dtype=dtype)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        # Windows are read in a shuffled order: read-ahead would fetch megabytes for each few kilobytes.
        mapped.madvise(mmap.MADV_RANDOM)
    # A size that is no whole number of tokens is for the caller to refuse, in words.
    return np.frombuffer(mapped, dtype=dtype, count=len(mapped) // dtype.itemsize)


def _hint(prefix: str) -> str:
    for guess in (f"{prefix}_text_document", prefix.removesuffix(".bin"), prefix.removesuffix(".idx")):
        if guess != prefix and os.path.isfile(f"{guess}.idx"):
            return f"; did you mean {guess!r}?"
    return ""


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
