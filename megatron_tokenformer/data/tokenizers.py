"""All kinds of tokenizers by name.  Their libraries are imported only when one is loaded."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from megatron_tokenformer.data.hf_tokenizer import HFTokenizer
from megatron_tokenformer.data.tiktoken_tokenizer import PATTERNS, TikTokenizer
from megatron_tokenformer.data.tokenizer_base import FlatIds, Tokenizer, flatten, hash_of, read_model
from megatron_tokenformer.errors import UserError

__all__ = [
    "TOKENIZER_TYPES",
    "ByteTokenizer",
    "FlatIds",
    "HFTokenizer",
    "SentencePieceTokenizer",
    "TikTokenizer",
    "Tokenizer",
    "add_tokenizer_arguments",
    "load_tokenizer",
]
TOKENIZER_TYPES = (
    "HFTokenizer",
    "GPT2BPETokenizer",
    "TikTokenizer",
    "SentencePieceTokenizer",
    "ByteTokenizer",
)


def load_tokenizer(
    type: str,
    model: str | None = None,
    *,
    merges: str | None = None,
    pattern: str | None = None,
    special_as_text: bool = False,
) -> Tokenizer:
    """Load a tokenizer by the name of its kind.

    Args:
        type: one of `TOKENIZER_TYPES`.
        model: a `tokenizer.json` (`HFTokenizer`), `vocab.json` (`GPT2BPETokenizer`), `.tiktoken`
            (`TikTokenizer`) or sentencepiece `.model` file; `ByteTokenizer` has none.
        merges: `merges.txt`, for `GPT2BPETokenizer`.
        pattern: how a `TikTokenizer` cuts texts into pieces, see `tiktoken_tokenizer.PATTERNS`.
        special_as_text: encode special tokens spelled out in texts as any other characters.  The last three
            types always do so.

    Raises:
        UserError: unknown type, a file or option that is missing or of another type, no end of document.
    """
    if type not in TOKENIZER_TYPES:
        raise UserError(f"unknown tokenizer type {type!r}; choose one of {', '.join(TOKENIZER_TYPES)}")
    for name, value, owner in (
        ("merge file", merges, "GPT2BPETokenizer"),
        ("pattern", pattern, "TikTokenizer"),
    ):
        if value is not None and type != owner:
            raise UserError(f"a {name} ({value!r}) is for {owner} only, not for {type}")
    if type == "ByteTokenizer":
        return ByteTokenizer()
    if not model:
        raise UserError(f"{type} needs a model file")
    if type == "GPT2BPETokenizer" and not merges:
        raise UserError("GPT2BPETokenizer needs a merge file (merges.txt) besides its vocabulary")
    for path in (model, merges):
        if path and not os.path.isfile(path):
            raise UserError(f"no tokenizer model at {path!r}")
    if type == "TikTokenizer":
        return TikTokenizer(model, pattern)
    if type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(model)
    return HFTokenizer(model, merges, special_as_text)


def add_tokenizer_arguments(parser: ArgumentParser, *, required: bool) -> None:
    """The options that name a tokenizer: `--tokenizer-type` and what its files are."""
    add = parser.add_argument
    default = None if required else "default: what PREFIX.json names"
    add("--tokenizer-type", required=required, choices=TOKENIZER_TYPES, help=default)
    add(
        "--tokenizer-model",
        "--vocab-file",
        metavar="FILE",
        help="tokenizer.json (HFTokenizer), vocab.json (GPT2BPETokenizer), .tiktoken (TikTokenizer) or "
        "sentencepiece .model (ByteTokenizer: none)",
    )
    add("--merge-file", metavar="FILE", help="merges.txt, for GPT2BPETokenizer")
    add(
        "--tiktoken-pattern",
        choices=tuple(PATTERNS),
        help="how TikTokenizer cuts texts, which its file does not say (default: that of OpenAI's files for "
        "these, else cl100k)",
    )


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as the end of a document.  For tests and tiny runs."""

    vocab_size = 257
    eod_id = 256
    options: dict[str, Any] = {}
    backend = None
    fingerprint = hash_of(b"ByteTokenizer")

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode("utf-8"))

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """The bytes of all texts."""
        rows = [text.encode("utf-8") for text in texts]
        ids = np.frombuffer(b"".join(rows), np.uint8).astype(np.int32)
        return FlatIds(ids, np.array([len(row) for row in rows], np.int32))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; broken UTF-8 is replaced, for a model may well emit it."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A sentencepiece `.model`; its end of sentence ends a document, and is never looked for in texts."""

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
        self.options: dict[str, Any] = {}
        self.backend = f"sentencepiece {version('sentencepiece')}"
        self.fingerprint = hash_of(read_model(model))

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self.model,)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self._backend.encode(text, out_type=int)

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """The ids of all texts, on one thread: callers bring their own processes."""
        return flatten(self._backend.encode(list(texts), out_type=int, num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control pieces give no text."""
        return self._backend.decode([int(i) for i in ids])
