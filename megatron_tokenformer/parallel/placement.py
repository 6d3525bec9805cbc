"""Which ranks are on which host, and what part of the model they hold, in words."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from megatron_tokenformer.config.schema import Parallel

SHOWN_HOSTS = 16
"""of a run with more, so many have a line of their own"""


def describe_placement(hosts: Sequence[str], parallel: Parallel, launcher: str) -> list[str]:
    """Lines that show the layout, and a warning if tensor-parallel ranks are on different hosts.

    Args:
        hosts: of each rank, in order.
        parallel: a layout that divides the ranks.
    """
    world, tensor = len(hosts), parallel.tensor
    data = world // (tensor * parallel.pipeline)
    names = list(dict.fromkeys(hosts))
    sequence = ", sequence parallel" if parallel.sequence and tensor > 1 else ""
    lines = [
        f"{world} processes on {len(names)} host(s), started by {launcher}: "
        f"tensor {tensor}, pipeline {parallel.pipeline}, data {data}{sequence}"
    ]
    for name in names[:SHOWN_HOSTS]:
        ranks = [rank for rank, host in enumerate(hosts) if host == name]
        lines.append(f"  {name}: {_held(ranks, tensor, data)}")
    if len(names) > SHOWN_HOSTS:
        lines.append(f"  and {len(names) - SHOWN_HOSTS} more hosts")
    apart = [
        group
        for group in (range(first, first + tensor) for first in range(0, world, tensor))
        if len({hosts[rank] for rank in group}) > 1
    ]
    if apart:
        group = apart[0]
        where = ", ".join(dict.fromkeys(hosts[rank] for rank in group))
        more = f", and so are {len(apart) - 1} more groups of them" if len(apart) > 1 else ""
        lines.append(
            f"warning: tensor-parallel ranks {ranges(group)} are on different hosts ({where}){more}; each "
            f"layer waits for the network between them: give parallel.tensor a value that divides the "
            f"processes of each host, and let the launcher place ranks by blocks"
        )
    return lines


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in a few words: `0-3, 8`."""
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in spans(numbers))


def spans(numbers: Iterable[int]) -> list[list[int]]:
    """Different numbers as the first and the last of each run of neighbours, in order."""
    runs = itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    joined = [[number for _, number in run] for _, run in runs]
    return [[run[0], run[-1]] for run in joined]


def _held(ranks: list[int], tensor: int, data: int) -> str:
    """Ranks of one host and their coordinates; tensor runs fastest, then data, then pipeline."""
    coordinates = {
        "pipeline stage": {rank // (tensor * data) for rank in ranks},
        "data": {rank // tensor % data for rank in ranks},
        "tensor": {rank % tensor for rank in ranks},
    }
    held = ", ".join(f"{name} {ranges(values)}" for name, values in coordinates.items())
    return f"rank {ranges(ranks)} ({held})"
