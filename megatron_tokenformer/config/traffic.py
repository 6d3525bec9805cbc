"""What a GPU sends in a training step, by purpose, from the configuration alone.

The collectives are those of `parallel/` and of DeepSpeed 0.19.8; `tests/config/test_traffic.py` counts them
in running engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_tokenformer.config.memory import (
    ELEMENT,
    padded_parameters,
    resolved_precision,
    stage_parameters,
)
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.stages import stage_layers

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]


@dataclass(frozen=True)
class Transfer:
    """One kind of call that a rank makes."""

    kind: Kind
    ranks: int
    calls: int
    """in a step"""
    size: int
    """bytes of the whole tensor of one call: what is summed, what is gathered, what is scattered"""

    @property
    def sent(self) -> float:
        """Bytes that the rank sends in a step, by the ring algorithms."""
        share = (self.ranks - 1) / self.ranks
        factor = {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "send": 1.0}
        return self.calls * self.size * factor[self.kind]


def tensor_transfers(config: RunConfig, stage: int, micro_batches: int) -> list[Transfer]:
    """The collectives of a rank of this stage with its tensor-parallel ranks (docs/architecture.md)."""
    ranks, layers = config.parallel.tensor, stage_layers(config)[stage]
    if ranks == 1:
        return []
    again = 2 if config.training.recompute == "layer" else 1  # forward collectives are done again as well
    first, last = stage == 0, stage == config.parallel.pipeline - 1
    tokens = config.training.micro_batch_size * config.data.sequence_length
    element, width = ELEMENT[resolved_precision(config)], config.model.hidden_size
    wide = element * tokens * width

    def calls(kind: Kind, count: int, size: int) -> Transfer:
        return Transfer(kind, ranks, count * micro_batches, size)

    into = 2 * layers * again  # into q, k, v and into the FFN; likewise out
    found = [
        *(calls("all_reduce", layers * (again + 1), 4 * tokens * totals) for totals in (3, 1, 1)),
        calls("reduce_scatter", layers * again, 3 * wide),  # q, k, v onto heads
        calls("all_gather", layers, 3 * wide),
        calls("all_gather", layers * again, wide),  # heads into output
        calls("reduce_scatter", layers, wide),
        calls("all_reduce", 3 * last, 4 * tokens),  # the cross entropy's maximum, target and sum
    ]
    if config.model.score_norm == "softmax":
        found += [calls("all_reduce", layers * again, element * tokens * maxima) for maxima in (3, 1, 1)]
    if config.parallel.sequence:
        found += [
            calls("all_gather", into + 2 * layers + first + last, wide),
            calls("reduce_scatter", into + 2 * layers + first + last, wide),
            calls("all_reduce", 2 * last, element * width),  # the final norm's gradients
        ]
    else:
        found.append(calls("all_reduce", into + 2 * layers + first + last, wide))
    return [transfer for transfer in found if transfer.calls]


def data_transfers(config: RunConfig, stage: int, data_ranks: int) -> list[Transfer]:
    """The collectives of a rank at the end of a step: gradients summed, new weights gathered."""
    if data_ranks == 1:
        return []
    precision = resolved_precision(config)
    padded, element = padded_parameters(config, stage, data_ranks), ELEMENT[precision]
    # bf16's are accumulated in fp32 but summed over ranks in bf16, all at once; others in buckets.
    numbers = padded if precision == "bf16" else stage_parameters(config, stage)
    return [
        Transfer("all_reduce", data_ranks, 1, element * numbers),
        Transfer("all_gather", data_ranks, 1, element * padded),
    ]


def pipeline_transfers(config: RunConfig, stage: int, micro_batches: int) -> list[Transfer]:
    """What a rank sends to the next and previous stage, and the sum of the tied embedding's gradients."""
    stages, parallel = config.parallel.pipeline, config.parallel
    if stages == 1:
        return []
    element = ELEMENT[resolved_precision(config)]
    tokens = config.training.micro_batch_size * config.data.sequence_length
    wide = element * tokens * config.model.hidden_size // (parallel.tensor if parallel.sequence else 1)
    found = [Transfer("send", 2, micro_batches * ((stage < stages - 1) + (stage > 0)), wide)]
    if config.data.isolate_documents and stage < stages - 1:
        found.append(Transfer("send", 2, micro_batches, 8 * tokens))  # positions
    if stage in (0, stages - 1):
        rows = config.model.vocab_size // parallel.tensor
        accumulated = 4 if resolved_precision(config) == "bf16" else element
        found.append(Transfer("all_reduce", 2, 1, accumulated * rows * config.model.hidden_size))
    return found
