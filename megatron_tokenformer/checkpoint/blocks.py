"""Large tensors of a checkpoint in blocks, so that memory holds one block and no more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_tokenformer.checkpoint.manifest import Interval, Manifest
from megatron_tokenformer.checkpoint.shards import IntervalReader


def read_blocks(
    folder: Path, manifest: Manifest, name: str, state: str, elements: int
) -> Iterator[tuple[int, Tensor]]:
    """One state of a whole tensor as (first element, fp32 values), in order.

    Args:
        elements: of each block but the last, wherever the shards are cut.

    Raises:
        UserError: a shard is not what the manifest says.
    """
    reader = IntervalReader(folder, manifest)
    stop = manifest.index[name][-1][0].stop
    for first in range(0, stop, elements):
        yield first, read_block(reader, Interval(name, first, min(first + elements, stop)), state)


def read_block(reader: IntervalReader, wanted: Interval, state: str) -> Tensor:
    """One state of an interval, fp32, wherever the shards are cut.

    Raises:
        UserError: see `read_blocks`.
    """
    block = torch.empty(wanted.stop - wanted.start)
    for start, values in reader.read(wanted, state):
        block[start - wanted.start :][: len(values)] = values
    return block
