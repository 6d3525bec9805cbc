"""Training samples: fixed windows of token files, blended and shuffled by the rules of `order`.

A run's place in its data is one integer, the number of samples it has seen.  Opening is constant in time,
nothing is built or cached, and no layout or length of a run changes what is at a position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron_tokenformer.data.indexed import TokenFile
from megatron_tokenformer.data.order import BLOCK, BlendTable, permute
from megatron_tokenformer.data.pair import Identity
from megatron_tokenformer.data.provenance import TokenizerRecord, tokenizer_of
from megatron_tokenformer.errors import UserError


class SourceInfo(NamedTuple):
    """One source of a blend."""

    prefix: str
    """its name"""
    weight: float
    """its share of the samples"""
    windows: int
    """samples in one epoch of it"""
    tokens: int
    """ids in it"""
    tokenizer: TokenizerRecord | None
    """what made it; None if no description tells"""


class TokenWindows:
    """A token file as samples: sample `i` is tokens `[i*S, i*S + S + 1)`; each token is predicted once.

    Raises:
        UserError: the file is broken, or too short for one window.
    """

    def __init__(self, prefix: str, sequence_length: int) -> None:
        self.file = TokenFile(prefix)
        self.sequence_length = sequence_length
        self._windows = (self.file.tokens - 1) // sequence_length
        if self._windows < 1:
            raise UserError(
                f"{prefix} has {self.file.tokens} tokens; a sequence length of {sequence_length} needs "
                f"at least {sequence_length + 1}"
            )

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index`: [S + 1] in the file's type, a view of the mapped file."""
        if not 0 <= index < self._windows:
            raise IndexError(f"window {index} of {self._windows}")
        return self.file.window(index * self.sequence_length, self.sequence_length + 1)

    def expect(self, index: int) -> np.ndarray:
        """Sample `index` as by `[]`; the system begins to read it from the disk."""
        window = self[index]
        self.file.expect(index * self.sequence_length, window.size)
        return window


class Blend:
    """An endless sequence of samples from weighted sources; see `open_blend`."""

    def __init__(self, windows: Sequence[TokenWindows], weights: Sequence[float], seed: int) -> None:
        self._windows = list(windows)
        self._seed = seed
        self._table = BlendTable(weights)
        self.sources = [
            SourceInfo(
                source.file.prefix,
                count / BLOCK,
                len(source),
                source.file.tokens,
                tokenizer_of(source.file.pair.sidecar),
            )
            for source, count in zip(windows, self._table.counts, strict=True)
        ]
        """what is blended, in the order given"""

    def __getitem__(self, position: int) -> np.ndarray:
        """The sample at position 0, 1, 2, ...: [S + 1] int64.  Sources start over as often as needed."""
        windows, index = self._locate(position)
        return windows[index].astype(np.int64)

    def expect(self, position: int) -> np.ndarray:
        """The sample at a position as a view, [S + 1] in its file's type; the system begins to read it."""
        windows, index = self._locate(position)
        return windows.expect(index)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse sources whose tokenizer has more ids than the model, as far as their `.json` tells.

        Raises:
            UserError: names the source and both sizes.
        """
        for source in self.sources:
            if source.tokenizer is not None and source.tokenizer.vocab_size > vocab_size:
                raise UserError(
                    f"{source.prefix} has {source.tokenizer.vocab_size} token ids, "
                    f"but the model's vocab_size is {vocab_size}"
                )

    def check_unchanged(self) -> None:
        """Refuse to go on with sources that are no longer what was opened; see `Pair.check_unchanged`.

        Raises:
            UserError: a file was replaced, rewritten or removed (exit code 1).
        """
        for source in self._windows:
            source.file.pair.check_unchanged()

    def identities(self) -> dict[str, Identity]:
        """What tells each source from another copy that differs, by prefix."""
        return {source.file.prefix: source.file.pair.identity for source in self._windows}

    def _locate(self, position: int) -> tuple[TokenWindows, int]:
        source, index = self._table.locate(position)
        windows = self._windows[source]
        epoch, place = divmod(index, len(windows))
        return windows, permute(place, len(windows), self._seed, epoch)


def open_blend(sources: Sequence[tuple[float, str]], sequence_length: int, seed: int) -> Blend:
    """Open token files as one blend.

    Args:
        sources: (weight, prefix) pairs; weights are relative and need not add up to one.
        sequence_length: S; samples have S + 1 tokens, the last S being the targets of the first.
        seed: of the order within each source.

    Raises:
        UserError: no sources, a weight that is not positive, a broken or too short file.
    """
    if sequence_length < 1:
        raise UserError(f"sequence_length must be at least 1, not {sequence_length}")
    windows = [TokenWindows(prefix, sequence_length) for _, prefix in sources]
    return Blend(windows, [weight for weight, _ in sources], seed)


def micro_batches(
    blend: Blend,
    position: int,
    micro_batch_size: int,
    micro_batches_per_step: int,
    data_rank: int = 0,
    data_size: int = 1,
) -> Iterator[torch.Tensor]:
    """The micro-batches of one data-parallel rank, without end: [micro_batch_size, S + 1] int64 each.

    With `B = micro_batch_size * micro_batches_per_step * data_size`, the k-th step's global batch is always
    the samples `position + k*B ... position + (k+1)*B - 1`.  Inside it, micro-batch m of rank r takes the
    `micro_batch_size` samples from `(m*data_size + r) * micro_batch_size` on.  So which samples a step
    learns from depends on B alone, not on how B is divided into ranks and micro-batches, and a run that
    resumes at `position + k*B` under any layout goes on with exactly the samples it would have had.
    When one is given out, the samples of the next are already being read from the disk.

    Args:
        position: samples seen by the run so far, over all ranks.

    Raises:
        ValueError: a rank outside its group, or sizes below one.
    """
    if min(micro_batch_size, micro_batches_per_step, data_size) < 1 or not 0 <= data_rank < data_size:
        raise ValueError(
            f"micro_batch_size {micro_batch_size}, micro_batches_per_step {micro_batches_per_step}, "
            f"data_rank {data_rank} of {data_size}"
        )
    return _micro_batches(blend, position, micro_batch_size, micro_batches_per_step, data_rank, data_size)


def _micro_batches(
    blend: Blend, position: int, micro_batch_size: int, per_step: int, data_rank: int, data_size: int
) -> Iterator[torch.Tensor]:
    ahead: list[np.ndarray] = []
    while True:
        for micro_batch in range(per_step):
            start = position + (micro_batch * data_size + data_rank) * micro_batch_size
            # While one micro-batch computes, the disk is at work on the next.
            windows, ahead = ahead, [blend.expect(start + i) for i in range(micro_batch_size)]
            if windows:
                yield torch.from_numpy(np.stack(windows, dtype=np.int64))
        position += micro_batch_size * per_step * data_size
