"""What every tokenizer is to the rest of the project, and the pieces that several of them share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_tokenformer.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class FlatIds(NamedTuple):
    """The ids of a batch of texts in one array: a list for each text would cost more than the tokens do."""

    ids: np.ndarray
    """[sum of lengths] int32, the texts one after another"""
    lengths: np.ndarray
    """[texts] int32, the tokens of each text"""


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer, which can be pickled: a worker loads it again."""

    vocab_size: int
    """one more than the largest id"""
    eod_id: int
    """the id that ends a document"""
    fingerprint: str
    """SHA-256 (hex) of the model file, and of what else decides about ids and is not in it; to tell whether
    two data sets belong together"""
    options: dict[str, Any]
    """what `load_tokenizer` needs besides type and model to load the same again"""

    @property
    def backend(self) -> str | None:
        """The library that does the work, and its version; None if that cannot matter."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end of document."""
        ...

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """The ids of all texts, equal to `encode`'s."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens give no text."""
        ...


def flatten(rows: Sequence[Sequence[int]]) -> FlatIds:
    """The ids of `rows` in one array."""
    lengths = np.array([len(row) for row in rows], np.int32)
    return FlatIds(np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths)


def read_model(path: str) -> bytes:
    """The content of a model file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer model {path!r}: {error.strerror}") from error


def hash_of(*parts: bytes) -> str:
    """SHA-256 (hex) of one part; of several, that of their hashes, so that borders between parts count."""
    hashes = [hashlib.sha256(part) for part in parts]
    return hashes[0].hexdigest() if len(hashes) == 1 else hash_of(b"".join(one.digest() for one in hashes))
