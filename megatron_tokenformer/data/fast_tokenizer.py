"""A fast backend: the ids of Hugging Face's `tokenizers`, and of `tiktoken`, many times faster.

`fastokens` is young, so it is never trusted: before each run its ids for a sample of that run's own input,
and for strings on which tokenizers are known to differ, are compared with those of the reference.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, TypeAlias

import numpy as np

from megatron_tokenformer.data.hf_tokenizer import HFTokenizer, read_definition
from megatron_tokenformer.data.tiktoken_tokenizer import PATTERNS, TikTokenizer
from megatron_tokenformer.data.tokenizer_base import END_OF_TEXT, FlatIds, Tokenizer
from megatron_tokenformer.errors import UserError

Reference: TypeAlias = HFTokenizer | TikTokenizer
# The tokenizers that have a fast backend, and the names of their own.
REFERENCES: dict[type, str] = {HFTokenizer: "huggingface", TikTokenizer: "tiktoken"}
BACKENDS = ("auto", "fastokens", *REFERENCES.values())

# What other tokenizers get wrong: combining marks, joiners, odd spaces and digits, special tokens and their
# neighbours, contractions, bytes at the ends of the UTF-8 ranges, very long runs.
HARD_TEXTS = (
    " ",
    "\n",
    " \t \r\n\r\n  \n x",
    "a  b   c    d",
    "trailing   ",
    "\u00a0\u2003\u3000 \u200b\ufeff\u2028\u2029\x85\x0b\x0c",
    "\x00\x01\x1b[0m\x7f\x80\x9f",
    "e\u0301 \u0301 \u0301\u0302\u0303 n\u0303\u0323 Z\u0351\u036b\u0343a\u030a\u0323",
    "\u1100\u1161\u11a8 \uac01 \u0915\u094d\u0937 \u0ba8\u0bbf \u0e01\u0e33 \u05e9\u05c1\u05b8 \u0644\u0651",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\U0001f1eb",
    "\U0001f44d\U0001f3fd \u2764\ufe0f #\ufe0f\u20e3",
    "\u0130\u0131\u017f\u212a\ufb01 \u1e9e \u01c5 \u2126 \u00c5",
    "I'm you'll they'VE it'S 'tis don\u2019t ''s '",
    "123 4567 89012345 3.14 1e-10 0xFF \u0661\u0662\u0663 \u00b2\u00b3\u00bd \u2460 \u2167 \U0001d7d8",
    'f(x)[0]->y::z//*#@!%^&_+-=|\\~`"<>?,.;:{}$',
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|> c<|endoftext|><|endoftext|>\n<|endoftext|>",
    "<|endoftext| <|ENDOFTEXT|> <|endoftext|>> <s> </s> <unk> <pad> [CLS] [MASK]",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002\u4e2d\u6587\uff0c\ud55c\uad6d\uc5b4",
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0639\u0631\u0628\u064a",
    "\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff",
    "a" * 5_000,
    " " * 5_000,
    "\n" * 3_000,
    " \n" * 1_000,
    "ab" * 2_000 + "\u0301" * 2_000,
    "\U0001f600" * 1_000,
    "0123456789" * 500,
    "=-" * 1_500,
)


class FastTokenizer:
    """What a reference does, through `fastokens`, with the methods of every `Tokenizer`.

    Args:
        reference: the tokenizer whose ids are wanted.  It is not kept: a worker, to which this object is
            pickled, need not load both libraries.

    Raises:
        Exception: whatever `fastokens` raises for a file that it does not take.
    """

    def __init__(self, reference: Reference) -> None:
        self._recipe = reference.__reduce__()
        self._special_as_text = reference.special_as_text
        self.vocab_size = reference.vocab_size
        self.eod_id = reference.eod_id
        self.fingerprint = reference.fingerprint
        self.options = reference.options
        self.backend = f"fastokens {version('fastokens')}"
        self._open()

    def _open(self) -> None:
        from fastokens import Tokenizer as Backend

        kind, arguments = self._recipe
        if kind is TikTokenizer:
            model, pattern = arguments
            special = {END_OF_TEXT: self.eod_id}
            self._backend = Backend.from_tiktoken(model, pattern=PATTERNS[pattern], special_tokens=special)
        else:
            model, merges, _ = arguments
            self._backend = Backend.from_json_str(read_definition(model, merges).decode("utf-8"))
        self._backend.no_truncation()
        self._backend.no_padding()
        self._reference: Reference | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_backend", "_reference")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self.encode_flat([text]).ids.tolist()

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """The ids of all texts; TOKENIZERS_PARALLELISM says on how many threads.

        A batch that `fastokens` refuses in the midst of a run is encoded by the reference, which is told.
        """
        try:
            return self.encode_unaided(texts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            if self._reference is None:
                kind, arguments = self._recipe
                print(f"note: a batch goes to {REFERENCES[kind]}: {_words(error)}", file=sys.stderr)
                self._reference = kind(*arguments)
            return self._reference.encode_flat(texts)

    def encode_unaided(self, texts: Sequence[str]) -> FlatIds:
        """The ids of all texts, by `fastokens` alone, with what it raises."""
        ids, offsets = self._backend.encode_batch_flat(
            list(texts), add_special_tokens=True, split_special_tokens=self._special_as_text
        )
        lengths = np.diff(np.frombuffer(offsets, "<u8").view(np.int64)).astype(np.int32)
        return FlatIds(np.frombuffer(ids, "<u4").view(np.int32), lengths)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)


def choose_backend(tokenizer: Tokenizer, wanted: str, sample: Sequence[str]) -> Tokenizer:
    """The fastest tokenizer that gives the ids of `tokenizer`.

    Args:
        tokenizer: only those of `REFERENCES` have another backend.
        wanted: `auto` (the fast one if it proves itself; if not, one line on standard error says why),
            `fastokens` (that or an error), or the name of the reference.
        sample: texts of the input, compared with `HARD_TEXTS` and the file's own added tokens in both
            backends.

    Raises:
        UserError: an unknown backend, one that `tokenizer` does not have, or `fastokens` where it fails.
    """
    if wanted not in BACKENDS:
        raise UserError(f"unknown tokenizer backend {wanted!r}; choose one of {', '.join(BACKENDS)}")
    own = REFERENCES.get(type(tokenizer))
    if wanted not in ("auto", own) and not (own and wanted == "fastokens"):
        fits = f"auto, fastokens or {own}" if own else "auto"
        raise UserError(
            f"the tokenizer backend {wanted} is not for a {type(tokenizer).__name__}; choose {fits}"
        )
    if not isinstance(tokenizer, Reference) or wanted == own:
        return tokenizer
    try:
        added = [between.join(["", *tokenizer.added_tokens, ""]) for between in ("a", " ")]
        fast = FastTokenizer(tokenizer)
        reason = difference(tokenizer, fast, [*HARD_TEXTS, *added, *sample])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        reason = _words(error)
    if not reason:
        return fast
    if wanted == "fastokens":
        raise UserError(f"fastokens cannot be used: {reason}")
    print(f"note: {own}, which is slower, instead of fastokens: {reason}", file=sys.stderr)
    return tokenizer


def difference(reference: Tokenizer, fast: FastTokenizer, texts: Sequence[str]) -> str | None:
    """Where the two first give different ids for `texts`, in words; None if they agree."""
    expected, found = reference.encode_flat(texts), fast.encode_unaided(texts)
    if all(map(np.array_equal, expected, found)):
        return None
    for text in texts:
        if reference.encode(text) != fast.encode_unaided([text]).ids.tolist():
            return f"other ids for {text[:40]!r}{'...' if len(text) > 40 else ''}"
    return "other ids in a batch than alone"


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
