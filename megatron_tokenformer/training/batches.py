"""Sample windows as what the pipeline's first and last stage take: inputs, and labels with weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.batches import Blend, micro_batches
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.layout import Layout

Batch = tuple[Tensor, tuple[Tensor, Tensor]]


def pipeline_batches(
    blend: Blend, position: int, config: RunConfig, layout: Layout, accumulation: int
) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches from a sample position on, without end.

    Each is inputs [b, s], and (targets [b, s], weights [b, s]) with the targets one position on.  All
    positions count the same, so that the mean over micro-batches is the mean over the global batch.

    Raises:
        UserError: an id that the embedding has no row for, in data that does not tell its vocabulary.
    """
    size = config.training.micro_batch_size
    for windows in micro_batches(blend, position, size, accumulation, layout.data_rank, layout.data_size):
        largest = int(windows.max())
        if largest >= config.model.vocab_size:
            names = ", ".join(source.prefix for source in blend.sources)
            raise UserError(
                f"token id {largest} in {names}, but model.vocab_size={config.model.vocab_size}", exit_code=1
            )
        inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        yield inputs, (targets, torch.full(targets.shape, 1.0 / targets.numel()))
