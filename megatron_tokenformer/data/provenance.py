"""Which tokenizer made data, and whether data, config and checkpoint agree about it.

Ids of another tokenizer are valid ids, so nothing else would tell: the loss would just be bad.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_tokenformer.data.sidecar import read_sidecar
from megatron_tokenformer.data.tokenizers import ByteTokenizer, file_hash
from megatron_tokenformer.errors import UserError


@dataclass(frozen=True)
class TokenizerRecord:
    """A tokenizer as descriptions and checkpoints tell it."""

    type: str
    fingerprint: str
    """SHA-256 (hex) of the model file"""
    vocab_size: int
    model: str | None = None
    """the model file, under the name that it had at preprocessing"""
    eod_id: int | None = None

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
    return TokenizerRecord(
        told["type"], told["fingerprint"], told["vocab_size"], told.get("model"), told.get("eod_id")
    )


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


def check_configured(type: str, model: str | None, made_with: TokenizerRecord) -> None:
    """Refuse a config's tokenizer that did not make the data, if its model file is here.

    Raises:
        UserError: names both, or the model file that cannot be read (exit code 1).
    """
    if type == "ByteTokenizer":
        name, fingerprint = type, ByteTokenizer.fingerprint
    elif model is not None and os.path.isfile(model):
        name = model
        try:
            fingerprint = file_hash(model)
        except OSError as error:
            raise UserError(f"cannot read {model}: {error.strerror}", exit_code=1) from error
    else:
        return
    if fingerprint != made_with.fingerprint:
        raise UserError(
            f"data.tokenizer is {named(name, fingerprint)}, but the data was made with {made_with}; "
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
