"""`.tiktoken` files: byte-pair ranks, through the `tiktoken` library.

Such a file holds ranks alone.  How texts are cut into pieces before any pair is merged (the pattern), and
which id ends a document, is known for OpenAI's own files by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import orjson

from megatron_tokenformer.data.tokenizer_base import END_OF_TEXT, FlatIds, flatten, hash_of, read_model
from megatron_tokenformer.errors import UserError

# The library has these only within functions that download; they are written as there, for another spelling
# can be slower, or cut odd spaces elsewhere.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
DEFAULT_PATTERN = "cl100k"
# SHA-256 of OpenAI's files, as in tiktoken_ext.openai_public: the pattern, and the id of <|endoftext|>, which
# is not always the one after the last rank.
KNOWN_FILES = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": ("gpt2", 50_256),  # r50k_base
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": ("gpt2", 50_256),  # p50k_base
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": ("cl100k", 100_257),  # cl100k_base
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": ("o200k", 199_999),  # o200k_base
}


class TikTokenizer:
    """A `.tiktoken` file.  `<|endoftext|>` ends documents and is never looked for in texts.

    Args:
        model: the file, lines of `base64 rank`.
        pattern: a name of `PATTERNS`; by default that of a known file, else `cl100k`.

    Raises:
        UserError: an unknown pattern, or a file that is not of this kind.
    """

    special_as_text = True
    added_tokens = (END_OF_TEXT,)

    def __init__(self, model: str, pattern: str | None = None) -> None:
        from tiktoken import Encoding

        content = read_model(model)
        known = KNOWN_FILES.get(hashlib.sha256(content).hexdigest())
        self.pattern = pattern or (known[0] if known else DEFAULT_PATTERN)
        if self.pattern not in PATTERNS:
            raise UserError(f"unknown pattern {pattern!r}; choose one of {', '.join(PATTERNS)}")
        self.model = model
        self.options: dict[str, Any] = {"pattern": self.pattern}
        self.backend = f"tiktoken {version('tiktoken')}"
        ranks = read_ranks(content, model)
        last = max(ranks.values())
        self.eod_id = known[1] if known else last + 1
        self.vocab_size = max(last, self.eod_id) + 1
        special = {END_OF_TEXT: self.eod_id}
        regex = PATTERNS[self.pattern]
        self._backend = Encoding(model, pat_str=regex, mergeable_ranks=ranks, special_tokens=special)
        self.fingerprint = hash_of(content, regex.encode(), orjson.dumps(special))

    def __reduce__(self) -> tuple[Any, ...]:
        return TikTokenizer, (self.model, self.pattern)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`.

        Raises:
            UserError: the library gave up, as it does on a million spaces with some patterns.
        """
        try:
            return self._backend.encode_ordinary(text)
        except BaseException as error:
            # A panic of a Rust library is no Exception, and its class has no other name to catch it by.
            if type(error).__name__ != "PanicException":
                raise
            told = f"{text[:40]!r}{'...' if len(text) > 40 else ''}"
            raise UserError(
                f"tiktoken cannot encode a text of {len(text):,} characters, {told}", 1
            ) from error

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """The ids of all texts, on one thread: callers bring their own processes."""
        return flatten([self.encode(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without the end of document; broken UTF-8 is replaced."""
        return self._backend.decode([i for i in ids if i != self.eod_id])


def read_ranks(content: bytes, path: str) -> dict[bytes, int]:
    """The rank, which is also the id, of each token of a `.tiktoken` file.

    Raises:
        UserError: a line that is no token and rank, or one that repeats either; a byte that has no rank.
    """
    lines = [line for line in content.splitlines() if line]
    ranks: dict[bytes, int] = {}
    for line in lines:
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:  # of which binascii.Error is one
            raise UserError(f"{path!r} is no .tiktoken file: {line[:40]!r} is not `base64 rank`") from error
    if not len(ranks) == len(set(ranks.values())) == len(lines) or min(ranks.values(), default=0) < 0:
        raise UserError(f"{path!r} is no .tiktoken file: tokens or ranks repeat, or a rank is negative")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            f"{path!r} is no .tiktoken file: {len(missing)} bytes have no rank, e.g. {missing[0]}"
        )
    return ranks
