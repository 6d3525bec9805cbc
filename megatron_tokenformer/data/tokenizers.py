"""Tokenizers behind one small protocol. Their libraries are imported only when one is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_tokenformer.errors import UserError

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


class FlatIds(NamedTuple):
    """The ids of a batch of texts in one array: a list for each text would cost more than the tokens do.

    Attributes:
        ids: ``[sum of lengths]`` int32, the texts one after another.
        lengths: ``[texts]`` int32, the tokens of each text.
    """

    ids: np.ndarray
    lengths: np.ndarray


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer. It can be pickled, to be loaded again in a worker.

    Attributes:
        vocab_size: one more than the largest id.
        eod_id: the id that ends a document.
        fingerprint: SHA-256 (hex) of the model file, to tell whether two data sets belong together.
    """

    vocab_size: int
    eod_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without an end of document."""
        ...

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """The ids of all texts, equal to :meth:`encode`'s."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens give no text."""
        ...


def load_tokenizer(type: str, model: str | None = None) -> Tokenizer:
    """Load a tokenizer by the name of its kind.

    Args:
        type: ``HFTokenizer`` (a ``tokenizer.json``), ``SentencePieceTokenizer`` (a ``.model``) or
            ``ByteTokenizer`` (no file).
        model: the model file.

    Raises:
        UserError: unknown type, no such file, a file of another kind, or no end-of-document token in it.
    """
    if type not in _KINDS:
        raise UserError(f"unknown tokenizer type {type!r}; choose one of {', '.join(_KINDS)}")
    if type == "ByteTokenizer":
        return ByteTokenizer()
    if not model:
        raise UserError(f"{type} needs a model file")
    if not os.path.isfile(model):
        raise UserError(f"no tokenizer model at {model!r}")
    return _KINDS[type](model)


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as the end of a document. For tests and tiny runs."""

    vocab_size = 257
    eod_id = 256
    fingerprint = hashlib.sha256(b"ByteTokenizer").hexdigest()

    def encode(self, text: str) -> list[int]:
        """The bytes of ``text``."""
        return list(text.encode("utf-8"))

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """The bytes of all texts."""
        rows = [text.encode("utf-8") for text in texts]
        ids = np.frombuffer(b"".join(rows), np.uint8).astype(np.int32)
        return FlatIds(ids, np.array([len(row) for row in rows], np.int32))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; broken UTF-8 is replaced, for a model may well emit it."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class HFTokenizer:
    """A ``tokenizer.json`` through the Hugging Face ``tokenizers`` library: the reference for its ids.

    :class:`~megatron_tokenformer.data.fast_tokenizer.FastTokenizer` gives the same ids many times faster.
    """

    def __init__(self, model: str) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import __version__

        self.model = model
        self.backend = f"tokenizers {__version__}"
        try:
            self._backend = Backend.from_file(model)
        except Exception as error:  # the library raises bare Exception for a bad file
            raise UserError(f"{model!r} is not a tokenizer.json: {error}") from error
        # A file saved with truncation or padding would silently cut or fill every document.
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        found = [vocabulary[name] for name in END_OF_DOCUMENT_NAMES if name in vocabulary]
        own = [i for i, token in self._backend.get_added_tokens_decoder().items() if token.special]
        if not found and len(own) == 1:
            found = own
        if not found:
            raise UserError(f"{model!r} has no end-of-document token ({', '.join(END_OF_DOCUMENT_NAMES)})")
        self.eod_id: int = found[0]
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = file_hash(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return HFTokenizer, (self.model,)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, with what the file's own template adds, as in GPT-NeoX and Megatron-LM."""
        return self._backend.encode(text).ids

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """The ids of all texts; TOKENIZERS_PARALLELISM says on how many threads."""
        return _flat([encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)


class SentencePieceTokenizer:
    """A sentencepiece ``.model``; its end of sentence ends a document."""

    def __init__(self, model: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model = model
        try:
            self._backend = SentencePieceProcessor(model_file=model)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{model!r} is not a sentencepiece model") from error
        self.eod_id: int = self._backend.eos_id()
        if self.eod_id < 0:
            raise UserError(f"{model!r} has no end-of-sentence piece, which is needed to end documents")
        self.vocab_size: int = self._backend.get_piece_size()
        self.fingerprint = file_hash(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self.model,)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""
        return self._backend.encode(text, out_type=int)

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """The ids of all texts, on one thread: callers bring their own processes."""
        return _flat(self._backend.encode(list(texts), out_type=int, num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; control pieces give no text."""
        return self._backend.decode([int(i) for i in ids])


def _flat(rows: list[list[int]]) -> FlatIds:
    lengths = np.array([len(row) for row in rows], np.int32)
    return FlatIds(np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths)


def file_hash(path: str) -> str:
    """SHA-256 (hex) of a model file, its tokenizer's fingerprint."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


_KINDS: dict[str, Callable[..., Tokenizer]] = {
    "HFTokenizer": HFTokenizer,
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "ByteTokenizer": ByteTokenizer,
}
TOKENIZER_TYPES = tuple(_KINDS)
