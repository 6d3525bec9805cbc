"""A whole dataset in order, as windows that do not overlap: each token but the first is predicted once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.documents import document_positions, needed_eod_id
from megatron_tokenformer.data.indexed import TokenFile
from megatron_tokenformer.data.provenance import TokenizerRecord, tokenizer_of
from megatron_tokenformer.errors import UserError


@dataclass(frozen=True)
class Reading:
    """How data are cut and what counts; where nothing else is asked for, as in the run's own validation."""

    sequence_length: int
    micro_batch_size: int
    isolate_documents: bool
    eod_mask_loss: bool
    eod_id: int | None
    """by default the one that each dataset's description tells"""
    max_tokens: int | None = None
    """so many predicted tokens of each dataset, from its beginning; None: all"""

    @classmethod
    def like(cls, config: RunConfig, **changes: int | bool | None) -> Reading:
        """As a run with this config reads, with the changes that are not None.

        Raises:
            UserError: a size below 1, or an id below 0.
        """
        data = config.data
        own = {
            "sequence_length": data.sequence_length,
            "micro_batch_size": config.training.micro_batch_size,
            "isolate_documents": data.isolate_documents,
            "eod_mask_loss": data.eod_mask_loss,
            "eod_id": data.eod_id,
        }
        asked = {key: value for key, value in changes.items() if value is not None}
        for key, value in asked.items():
            least = 0 if key == "eod_id" else 1
            if not isinstance(value, bool) and value < least:
                option = f"--{key.replace('_', '-')}"
                raise UserError(f"{option} {value} is too small; it must be at least {least}")
        return cls(**{**own, **asked})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Batch:
    """Windows of one length, [b, s] each.  Positions are None where documents see each other."""

    inputs: Tensor
    targets: Tensor
    counted: Tensor
    """whether a target counts, booleans"""
    positions: Tensor | None


@dataclass(frozen=True)
class Dataset:
    """A dataset that fits the model; see `open_dataset`."""

    file: TokenFile
    reading: Reading
    eod_id: int | None
    vocab_size: int

    @property
    def targets(self) -> int:
        """Tokens that are predicted of the whole dataset: all but the first."""
        return self.file.tokens - 1

    @property
    def wanted(self) -> int:
        """Tokens that are predicted of it here."""
        limit = self.reading.max_tokens
        return self.targets if limit is None else min(limit, self.targets)

    @property
    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the texts, as the description tells; None if it does not."""
        told = (self.file.pair.sidecar or {}).get("text_bytes")
        return told if isinstance(told, int) and told > 0 else None

    @property
    def component(self) -> str | None:
        """Of the Pile, say, as the description of a dataset of one component tells; else None."""
        told = (self.file.pair.sidecar or {}).get("component")
        return told if isinstance(told, str) else None

    @property
    def batch_count(self) -> int:
        """Batches in all; a last, shorter window is one of its own."""
        full, rest = divmod(self.wanted, self.reading.sequence_length)
        return -(-full // self.reading.micro_batch_size) + (rest > 0)

    def batches(self, rank: int, size: int) -> Iterator[Batch]:
        """Every `size`-th batch, from number `rank` on.

        Raises:
            UserError: an id that the embedding has no row for.
        """
        isolate, mask = self.reading.isolate_documents, self.reading.eod_mask_loss
        end = cast(int, self.eod_id)  # known where either is on, and not looked at elsewhere
        for number in range(rank, self.batch_count, size):
            inputs, targets = self._windows(number)
            counted = inputs != end if mask else torch.ones_like(inputs, dtype=torch.bool)
            positions = document_positions(inputs, end) if isolate else None
            yield Batch(inputs, targets, counted, positions)

    def _windows(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a batch, [b, s] each."""
        length, first = self.reading.sequence_length, number * self.reading.micro_batch_size
        windows = min(self.wanted // length - first, self.reading.micro_batch_size)
        if windows <= 0:  # the last, shorter one
            first, windows, length = self.wanted // length, 1, self.wanted % length
        stream = self.file.window(first * self.reading.sequence_length, windows * length + 1)
        tokens = torch.from_numpy(stream.astype(np.int64))
        largest = int(tokens.max())
        if largest >= self.vocab_size:
            raise UserError(
                f"token id {largest} in {self.file.prefix}, but the checkpoint's model.vocab_size is "
                f"{self.vocab_size}",
                exit_code=1,
            )
        return tokens[:-1].view(windows, length), tokens[1:].view(windows, length)


def open_dataset(
    prefix: str, reading: Reading, vocab_size: int, checkpoint: object, made_with: TokenizerRecord | None
) -> Dataset:
    """Open a dataset for a model, as far as both are known to belong together.

    Args:
        checkpoint: its name, for messages.
        made_with: the tokenizer of the data that the checkpoint was trained on; None if unknown.

    Raises:
        UserError: it is missing (2), damaged (1), too short, of another tokenizer, of more ids than the model
            has, or documents are to be told apart and nothing tells their end.
    """
    file = TokenFile(prefix)
    if file.tokens < 2:
        raise UserError(f"{prefix} has {file.tokens} tokens; to predict one takes 2")
    tokenizer = tokenizer_of(file.pair.sidecar)
    if tokenizer is not None:
        if made_with is not None and made_with.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"checkpoint {checkpoint} was trained on data made with {made_with}, {prefix} was made with "
                f"{tokenizer}, so its ids mean other tokens; preprocess it with the checkpoint's tokenizer"
            )
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{prefix} has {tokenizer.vocab_size} token ids, but the checkpoint's model.vocab_size is "
                f"{vocab_size}"
            )
    return Dataset(file, reading, _eod_id(prefix, reading), vocab_size)


def _eod_id(prefix: str, reading: Reading) -> int | None:
    try:
        return needed_eod_id([prefix], reading.isolate_documents, reading.eod_mask_loss, reading.eod_id)
    except UserError as error:
        here = "here: --eod-id ID, or --no-isolate-documents --no-eod-mask-loss"
        raise UserError(f"{error} ({here})", error.exit_code) from None
