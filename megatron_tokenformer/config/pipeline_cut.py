"""How the layers are cut into pipeline stages of equal work, and how long stages wait for each other.

The work of a layer is what it computes in a step: its matrix products (`sizes.py`), and those that it
computes again.  The embedding's lookup is none; the head is often worth several layers (at 124M almost five).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import (
    chunk_rows,
    head_forward_flops,
    layer_forward_flops,
    micro_batch_tokens,
)

BEFORE_LAYERS = 1
"""pipeline layers before the first Tokenformer layer: the embedding"""
AFTER_LAYERS = 3
"""and after the last: positions are dropped, final norm, head (`model/pipeline.py`)"""


def layer_work(config: RunConfig) -> int:
    """Operations that one layer carries out for one token in a step, recomputed ones included."""
    model, recompute = config.model, config.training.recompute
    forward = layer_forward_flops(model, config.data.sequence_length)
    if recompute == "layer":
        return 4 * forward
    again = 2 * model.hidden_size * _scores_made_again(config) if recompute == "scores" else 0
    return 3 * forward + again


def _scores_made_again(config: RunConfig) -> int:
    """Of a token and layer with training.recompute=scores: products of X with K, or of dY with V, done twice.

    One, and three more where chunks wait for the sum over tensor-parallel ranks (`model/pattend.py`).
    """
    tensor, rows = config.parallel.tensor, micro_batch_tokens(config)
    sizes = config.model.tokens
    return sum(
        projections * n * (4 if tensor > 1 and rows > chunk_rows(n // tensor) else 1)
        for projections, n in ((3, sizes.qkv), (1, sizes.output), (1, sizes.ffn))
    )


def pipeline_work(config: RunConfig) -> tuple[int, ...]:
    """Operations per token in a step of every layer of the pipeline, from the embedding to the head."""
    model = config.model
    ends = (0,) * (AFTER_LAYERS - 1)
    return (
        (0,) * BEFORE_LAYERS + (layer_work(config),) * model.layers + ends + (3 * head_forward_flops(model),)
    )


def stage_bounds(config: RunConfig) -> tuple[int, ...]:
    """Where stages begin in the list of pipeline layers, and its length: `pipeline + 1` numbers."""
    return split_evenly(pipeline_work(config), config.parallel.pipeline)


@lru_cache(maxsize=256)
def split_evenly(work: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Cut a list into contiguous parts so that the largest sum is as small as it can be.

    Among such cuts it takes the most even one (least sum of squares), and then the one with the earliest
    bounds.  Exact, by dynamic programming, for as many items as a model has layers.

    Args:
        work: not negative; at least as many items as parts.

    Returns:
        `parts + 1` bounds, the first 0 and the last `len(work)`; no part is empty.
    """
    until = [0, *accumulate(work)]
    largest, _ = _cheapest_cut(until, parts, max)
    _, bounds = _cheapest_cut(until, parts, lambda cost, part: cost + part**2 if part <= largest else None)
    return tuple(bounds)


def _cheapest_cut(
    until: Sequence[int], parts: int, cost_with: Callable[[int, int], int | None]
) -> tuple[int, list[int]]:
    """The cut of least cost; of equal ones the first in the order of their bounds.

    Args:
        until: sums of the items before each bound.
        cost_with: the cost of some parts and one more, from theirs and its sum; None forbids it.
    """
    cheapest = {0: (0, [0])}  # by where the parts so far end
    for part in range(1, parts + 1):
        ends = range(part, len(until) - (parts - part)) if part < parts else [len(until) - 1]
        longer = {}
        for end in ends:
            cuts = [
                (total, [*bounds, end])
                for start, (cost, bounds) in cheapest.items()
                if start < end and (total := cost_with(cost, until[end] - until[start])) is not None
            ]
            if cuts:
                longer[end] = min(cuts)
        cheapest = longer
    return cheapest[len(until) - 1]


def stage_works(config: RunConfig) -> list[int]:
    """Operations per token in a step of each stage."""
    work = pipeline_work(config)
    return [sum(work[first:end]) for first, end in pairwise(stage_bounds(config))]


def stage_layers(config: RunConfig) -> list[int]:
    """Tokenformer layers of each stage."""
    last = BEFORE_LAYERS + config.model.layers
    bounds = [min(max(bound, BEFORE_LAYERS), last) for bound in stage_bounds(config)]
    return [end - first for first, end in pairwise(bounds)]


def bubble_share(pipeline: int, micro_batches: int) -> float:
    """Share of a step that a stage waits in 1F1B, the stages' work being equal: (p - 1) / (m + p - 1)."""
    return (pipeline - 1) / (micro_batches + pipeline - 1)


def slowest_share(config: RunConfig) -> float:
    """The slowest stage's work over the mean work of a stage: 1 where all are equal."""
    works = stage_works(config)
    return max(works) * len(works) / sum(works)


def describe_pipeline(config: RunConfig, micro_batches: int) -> str:
    """What a run says of its pipeline when it starts: how even the stages are, and how long they wait."""
    stages = config.parallel.pipeline
    said = f"{micro_batches} micro-batch(es) of {config.training.micro_batch_size} per step and rank"
    if stages == 1:
        return said
    layers = ", ".join(map(str, stage_layers(config)))
    return (
        f"stages: {layers} layers, the last with the head; the slowest has {slowest_share(config):.2f} of "
        f"the mean work; {said}: the bubble is {bubble_share(stages, micro_batches):.1%} of a step"
    )
