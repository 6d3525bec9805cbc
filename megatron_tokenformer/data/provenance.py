"""Which tokenizer made data, and whether data, config and checkpoint agree about it.

Ids of another tokenizer are valid ids, so nothing else would tell: the loss would just be bad.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_tokenformer.data.sidecar import read_sidecar
from megatron_tokenformer.data.tokenizers import load_tokenizer
from megatron_tokenformer.errors import UserError


@dataclass(frozen=True)
class TokenizerRecord:
    """A tokenizer as descriptions and checkpoints tell it."""

    type: str
    fingerprint: str
    """a hash of the model file, and of what else decides about ids"""
    vocab_size: int
    model: str | None = None
    """the model file, under the name that it had at preprocessing"""
    eod_id: int | None = None
    merges: str | None = None
    """the merge file of a GPT2BPETokenizer"""
    pattern: str | None = None
    """of a TikTokenizer"""

    def __str__(self) -> str:
        return named(self.model or self.type, self.fingerprint)


def named(name: str, fingerprint: str) -> str:
    """A tokenizer in words, by its name and the first digits of its hash."""
    return f"{name} (hash {fingerprint[:12]})"


def tokenizer_of(sidecar: dict[str, Any] | None) -> TokenizerRecord | None:
    """The tokenizer that a description tells; None without one."""
    if sidecar is None:
        return None
    told = sidecar["tokenizer"]
    return TokenizerRecord(**{name: told[name] for name in TokenizerRecord.__annotations__ if name in told})


def read_tokenizer(prefix: str) -> TokenizerRecord | None:
    """The tokenizer of a dataset, of which only the description need be here; None without one.

    Raises:
        UserError: the description is damaged.
    """
    return tokenizer_of(read_sidecar(prefix))


def one_tokenizer(sources: Iterable[tuple[str, TokenizerRecord | None]]) -> TokenizerRecord | None:
    """The tokenizer of all sources, given as (prefix, tokenizer); None if no description tells one.

    Raises:
        UserError: names two sources that differ, and their tokenizers.
    """
    first: tuple[str, TokenizerRecord] | None = None
    for prefix, tokenizer in sources:
        if tokenizer is None:
            continue
        if first is None:
            first = prefix, tokenizer
        elif tokenizer.fingerprint != first[1].fingerprint:
            raise UserError(
                f"tokenizers differ: {first[0]} was made with {first[1]}, {prefix} with {tokenizer}; "
                "preprocess one of them again with the other's tokenizer"
            )
    return first[1] if first else None


def check_configured(
    made_with: TokenizerRecord,
    type: str,
    model: str | None,
    *,
    merges: str | None = None,
    pattern: str | None = None,
) -> None:
    """Refuse a config's tokenizer (as `load_tokenizer` takes it) that did not make the data.

    One whose files are not here is passed over.

    Raises:
        UserError: names both, or the file that cannot be read.
    """
    files = [path for path in (model, merges) if path]
    if type != "ByteTokenizer" and not (files and all(map(os.path.isfile, files))):
        return
    loaded = load_tokenizer(type, model, merges=merges, pattern=pattern)
    if loaded.fingerprint != made_with.fingerprint:
        name = named(model or type, loaded.fingerprint)
        raise UserError(
            f"data.tokenizer is {name}, but the data was made with {made_with}; "
            "name the tokenizer that made the data, or preprocess it again"
        )


def check_continued(checkpoint: object, before: TokenizerRecord | None, now: TokenizerRecord | None) -> None:
    """Refuse to train a checkpoint on with data of another tokenizer, as far as both are known.

    Raises:
        UserError: names the checkpoint and both tokenizers.
    """
    if before is not None and now is not None and before.fingerprint != now.fingerprint:
        raise UserError(
            f"checkpoint {checkpoint} was trained on data made with {before}, the config's data was made "
            f"with {now}; preprocess the data with the checkpoint's tokenizer, or train from the start in "
            "another run_dir"
        )
