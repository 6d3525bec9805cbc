"""How Megatron's index (`PREFIX.idx`) is laid out, and its three tables, read part by part.

Little endian: magic `MMIDIDX\\0\\0`, u64 version 1, u8 code of the token type, u64 sequences, u64 document
boundaries (documents + 1), then i32 sequence lengths, i64 byte pointers into `PREFIX.bin`, i64 boundaries.
Document `d` is the sequences `[boundary[d], boundary[d + 1])`; most tools write one sequence a document.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megatron_tokenformer.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
PART = 1 << 20


class Index(NamedTuple):
    """An index whose header was read and whose size is right; the tables are read when asked for."""

    path: str
    """the `.idx`"""
    dtype: np.dtype
    """the type of the ids in the `.bin`"""
    sequences: int
    """lengths and pointers in it"""
    documents: int
    """one less than its boundaries"""

    @property
    def pointers_at(self) -> int:
        """The byte of the `.idx` where the pointers begin."""
        return HEADER.size + 4 * self.sequences

    @property
    def boundaries_at(self) -> int:
        """The byte of the `.idx` where the document boundaries begin."""
        return HEADER.size + 12 * self.sequences

    @property
    def bytes(self) -> int:
        """The size of the `.idx`."""
        return self.boundaries_at + 8 * (self.documents + 1)

    def lengths(self, start: int, count: int) -> np.ndarray:
        """Tokens in the sequences from `start` on: [count] int32."""
        return self._table(np.int32, HEADER.size, start, count)

    def pointers(self, start: int, count: int) -> np.ndarray:
        """First bytes in the `.bin` of the sequences from `start` on: [count] int64."""
        return self._table(np.int64, self.pointers_at, start, count)

    def boundaries(self, start: int, count: int) -> np.ndarray:
        """First sequences of the documents from `start` on: [count] int64, of `documents + 1`."""
        return self._table(np.int64, self.boundaries_at, start, count)

    def token_bytes(self) -> int:
        """The size that the `.bin` must have, as far as the last sequence tells."""
        if self.sequences == 0:
            return 0
        last = self.sequences - 1
        return int(self.pointers(last, 1)[0]) + int(self.lengths(last, 1)[0]) * self.dtype.itemsize

    def _table(self, dtype: type, table_at: int, start: int, count: int) -> np.ndarray:
        offset = table_at + np.dtype(dtype).itemsize * start
        values: np.ndarray = np.fromfile(self.path, dtype, count, offset=offset)
        if values.size != count:
            raise UserError(f"{self.path} became shorter while it was read", exit_code=1)
        return values


def read_index(path: str) -> Index:
    """Read the header of an index, and hold it against the size of the file.

    Raises:
        UserError: not an index, one of an unknown version or type, or cut short.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        head, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(f"{path} is not a Megatron index (its first bytes are not MMIDIDX)")
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != 1:
        raise UserError(f"{path} has index version {version}; only version 1 is known")
    if code not in _DTYPES:
        raise UserError(f"{path} has the unknown token type code {code}")
    index = Index(path, np.dtype(_DTYPES[code]), sequences, boundaries - 1)
    if size != index.bytes or boundaries < 1:
        raise UserError(
            f"{path} has {size} bytes, but {sequences} sequences and {boundaries} document boundaries "
            f"need {index.bytes}: the file is cut short or damaged"
        )
    return index


def parts(total: int, size: int = PART) -> Iterator[tuple[int, int]]:
    """Cut `total` things into (start, count) of at most `size`."""
    for start in range(0, total, size):
        yield start, min(size, total - start)


def document_lengths(index: Index) -> Iterator[np.ndarray]:
    """Tokens of each document, int64, in parts of any size; lengths and boundaries must be sound.

    Memory is bounded although documents and sequences are cut at different places: what is carried from part
    to part is the token at which the last whole document ended.
    """
    taken, tokens, document_end = 0, 0, 0
    # One empty part where there are no sequences, for there may still be (empty) documents.
    for start, count in [*parts(index.sequences)] or [(0, 0)]:
        lengths = index.lengths(start, count)
        ends = np.concatenate(([tokens], tokens + np.cumsum(lengths, dtype=np.int64)))
        tokens = int(ends[-1])
        while taken < index.documents:
            boundaries = index.boundaries(taken + 1, min(PART, index.documents - taken))
            here = int(np.searchsorted(boundaries, start + count, side="right"))
            if here:
                reached = ends[boundaries[:here] - start]
                yield np.diff(reached, prepend=document_end)
                taken, document_end = taken + here, int(reached[-1])
            if here < boundaries.size:
                break
