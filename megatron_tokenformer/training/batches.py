"""Sample windows as what the pipeline's first and last stage take: inputs, and labels with weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, repeat
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.batches import Blend, micro_batches
from megatron_tokenformer.data.documents import document_positions
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.layout import Layout

Batch = tuple[Tensor | tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def pipeline_batches(
    blend: Blend,
    position: int,
    config: RunConfig,
    layout: Layout,
    accumulation: int,
    eod_id: int | None = None,
) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches from a sample position on, without end.

    Each is inputs [b, s], and (targets [b, s], weights [b, s]) with the targets one position on.  With
    data.isolate_documents the inputs are (inputs, positions [b, s]).  All counted positions have the same
    weight, so that the mean over micro-batches and ranks is the mean over the counted positions.

    Args:
        accumulation: micro-batches of a rank that one mean is taken over: a step's, or an evaluation's.
        eod_id: the end-of-document id; not None if data.isolate_documents or data.eod_mask_loss is on.

    Raises:
        UserError: an id that the embedding has no row for, in data that does not tell its vocabulary.
    """

    def read() -> Iterator[Tensor]:
        size = config.training.micro_batch_size
        return micro_batches(blend, position, size, accumulation, layout.data_rank, layout.data_size)

    isolate, mask = config.data.isolate_documents, config.data.eod_mask_loss
    end = cast(int, eod_id)  # known where either is on, and not looked at elsewhere
    positions = config.training.micro_batch_size * config.data.sequence_length
    uniform = repeat(torch.tensor(1.0 / positions))
    each = counted_weights(read(), end, layout, accumulation) if mask else uniform
    for windows, weight in zip(read(), each):
        largest = int(windows.max())
        if largest >= config.model.vocab_size:
            names = ", ".join(source.prefix for source in blend.sources)
            raise UserError(
                f"token id {largest} in {names}, but model.vocab_size={config.model.vocab_size}", exit_code=1
            )
        inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        counted = inputs != end if mask else torch.ones_like(inputs, dtype=torch.bool)
        weights = counted.to(weight.device) * weight
        yield (inputs, document_positions(inputs, end)) if isolate else inputs, (targets, weights)


def counted_weights(
    windows: Iterator[Tensor], eod_id: int, layout: Layout, accumulation: int
) -> Iterator[Tensor]:
    """For each micro-batch the weight of its counted positions: those whose input does not end a document.

    The windows are those of the micro-batches, read once more: the weights of the first depend on the last.
    They are counted over `accumulation` micro-batches of all data-parallel ranks, so the weight is the same
    under every layout.  It stays on the device: asking for its value would wait for the step before.
    """
    while True:
        here = sum(torch.count_nonzero(w[:, :-1] != eod_id) for w in islice(windows, accumulation))
        counted = torch.as_tensor(here, device=layout.device)
        # All-reduce over the data-parallel ranks of this stage: they all come here at the same micro-batch.
        dist.all_reduce(counted, group=layout.data_group)
        yield from repeat(layout.data_size * accumulation / counted.clamp(min=1), accumulation)
