"""What each rank exchanges with the others in a step, by formula: calls and bytes by purpose and kind.

docs/parallelism.md explains the rows; `tests/parallel/test_traffic.py` holds them against what
`parallel/traffic.py` counts in real steps.  No formula has the number of parameter tokens in it, except those
of the data-parallel ranks, who exchange gradients and weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from megatron_tokenformer.config.pipeline_cut import stage_layers
from megatron_tokenformer.config.schema import RunConfig, ScoreNorm
from megatron_tokenformer.config.sizes import micro_batch_tokens, norm_weights, product_weights

FP32 = 4
ELEMENT = {"fp32": FP32, "bf16": 2, "fp16": 2}
"""bytes of a number in each precision"""

ACTIVATIONS = "activations"
ROW_TOTALS = "row totals"
LOSS = "loss"
PIPELINE = "pipeline"
TIED_EMBEDDING = "tied embedding"
GRADIENTS = "gradients"
WEIGHTS = "weights"

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "send", "receive"]
_SENT = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}


@dataclass(frozen=True)
class Traffic:
    """Calls of one kind, for one purpose, that a rank takes part in."""

    purpose: str
    kind: str
    ranks: int
    """how many take part"""
    bytes: int
    """of the whole tensors, over all calls: what is reduced, what a gather makes, what a scatter takes"""
    calls: int = 1

    @property
    def sent(self) -> float:
        """Bytes that this rank sends when each collective goes round a ring (bandwidth-optimal)."""
        if self.kind in _SENT:
            return _SENT[self.kind] * self.bytes * (self.ranks - 1) / self.ranks
        return 0.0 if self.kind == "receive" else float(self.bytes)

    def times(self, number: int) -> Traffic:
        """The same, so many times."""
        return replace(self, bytes=number * self.bytes, calls=number * self.calls)


class Row(NamedTuple):
    """One tensor that tensor-parallel ranks exchange: by which collective forward, and by which backward."""

    purpose: str
    bytes: int
    forward: Kind | None
    backward: Kind | None


def total(traffic: Iterable[Traffic]) -> dict[tuple[str, str], Traffic]:
    """Calls and bytes by purpose and kind, in order of purpose; groups of one rank exchange nothing."""
    sums: dict[tuple[str, str], Traffic] = {}
    for one in traffic:
        if one.ranks > 1:
            key = one.purpose, one.kind
            sofar = sums.get(key, replace(one, bytes=0, calls=0))
            sums[key] = replace(sofar, bytes=sofar.bytes + one.bytes, calls=sofar.calls + one.calls)
    return dict(sorted(sums.items()))


def sent(traffic: Iterable[Traffic]) -> float:
    """Bytes that a rank sends for all of these."""
    return sum(one.sent for one in traffic if one.ranks > 1)


def tokenformer_rows(
    width: int, positions: int, element: int, sequence: bool, score_norm: ScoreNorm = "l2_norm_gelu"
) -> list[Row]:
    """A Tokenformer layer's, for `positions` = s b of a micro-batch: 16 (p-1)/p of [s, b, d] and the totals.

    Args:
        element: bytes of an activation's number (`ELEMENT`).
        sequence: whether the sequence is split between Pattentions.
    """
    x = positions * width * element
    into, out = _boundaries(x, sequence)

    def norms(number: int) -> list[Row]:
        """Of so many Pattentions on one input: softmax subtracts the row's maximum first."""
        maxima = Row(ROW_TOTALS, number * positions * FP32, "all-reduce", None)
        totals = Row(ROW_TOTALS, number * positions * FP32, "all-reduce", "all-reduce")
        return [maxima, totals] if score_norm == "softmax" else [totals]

    onto_heads = Row(ACTIVATIONS, 3 * x, "reduce-scatter", "all-gather")  # of q, k, v
    from_heads = Row(ACTIVATIONS, x, "all-gather", "reduce-scatter")  # into output
    return [into, *norms(3), onto_heads, from_heads, *norms(1), out, into, *norms(1), out]


def transformer_rows(width: int, positions: int, element: int, sequence: bool) -> list[Row]:
    """A dense Transformer layer's, split as Megatron does: 8 (p-1)/p of [s, b, d].

    Into and out of attention, into and out of the MLP (arXiv 1909.08053, 2205.05198), and under sequence
    parallelism the gradients of its norms.  There Megatron's own code gathers the two inputs once more in the
    backward pass, to keep less; that is not counted here, as we keep them.
    """
    return [*_norm(width, element, sequence), *_boundaries(positions * width * element, sequence)] * 2


def first_rows(width: int, positions: int, element: int, sequence: bool) -> list[Row]:
    """The embedding's, on the first stage."""
    return [_boundaries(positions * width * element, sequence)[1]]


def last_rows(width: int, positions: int, element: int, sequence: bool) -> list[Row]:
    """The head's and the loss's, on the last stage.  The loss is megatron-core's cross entropy."""
    maximum_label_and_sum = [Row(LOSS, positions * FP32, "all-reduce", None)] * 3
    head = _boundaries(positions * width * element, sequence)[0]
    return [*_norm(width, element, sequence), head, *maximum_label_and_sum]


def _norm(width: int, element: int, sequence: bool) -> list[Row]:
    """A norm's gain and bias: whole on every rank, whose gradients are sums over the ranks' positions."""
    return [Row(ACTIVATIONS, 2 * width * element, None, "all-reduce")] if sequence else []


def _boundaries(size: int, sequence: bool) -> tuple[Row, Row]:
    """Into and out of what is split, with [s, b, d] of so many bytes."""
    if sequence:
        into = Row(ACTIVATIONS, size, "all-gather", "reduce-scatter")
        return into, Row(ACTIVATIONS, size, "reduce-scatter", "all-gather")
    return Row(ACTIVATIONS, size, None, "all-reduce"), Row(ACTIVATIONS, size, "all-reduce", None)


def passes(rows: Iterable[Row], ranks: int, forward: int = 1, backward: int = 1) -> list[Traffic]:
    """The rows as collectives of `ranks`, with so many forward and backward passes."""
    return [
        Traffic(row.purpose, kind, ranks, row.bytes).times(number)
        for row in rows
        for kind, number in ((row.forward, forward), (row.backward, backward))
        if kind is not None
    ]


def tensor_traffic(config: RunConfig, precision: str, stage: int) -> list[Traffic]:
    """What tensor-parallel ranks exchange for one micro-batch on a pipeline stage.

    Args:
        precision: `bf16`, `fp16` or `fp32`: what training.precision comes to on the device.
    """
    model, ranks = config.model, config.parallel.tensor
    first, last = ends(config, stage)
    shape = (
        model.hidden_size,
        micro_batch_tokens(config),
        ELEMENT[precision],
        config.parallel.sequence and ranks > 1,
    )
    # With `layer` the backward pass runs the layer forward again, collectives and all.  With `scores` it only
    # makes products again.
    again = 2 if config.training.recompute == "layer" else 1
    if model.is_dense:
        rows = transformer_rows(*shape)
    else:
        rows = tokenformer_rows(*shape, model.score_norm)
    layer = passes(rows, ranks, forward=again)
    layers = stage_layers(config)[stage]
    return [
        *(passes(first_rows(*shape), ranks) if first else []),
        *(one.times(layers) for one in layer if layers),
        *(passes(last_rows(*shape), ranks) if last else []),
    ]


def pipeline_traffic(config: RunConfig, precision: str, stage: int) -> list[Traffic]:
    """What a stage exchanges with its neighbours for one micro-batch: activations there, gradients back."""
    parallel, positions = config.parallel, micro_batch_tokens(config)
    first, last = ends(config, stage)
    kept = parallel.tensor if parallel.sequence else 1
    size = positions * config.model.hidden_size * ELEMENT[precision] // kept
    places = 8 * positions if config.data.isolate_documents else 0  # int64, forward only, not split
    both: list[Traffic] = []
    for there, forward, backward in ((not first, "receive", "send"), (not last, "send", "receive")):
        if there:
            both += [Traffic(PIPELINE, kind, 2, size) for kind in (forward, backward)]
            both += [Traffic(PIPELINE, forward, 2, places)] if places else []
    return both


def data_traffic(config: RunConfig, precision: str, data_size: int, stage: int) -> list[Traffic]:
    """What is exchanged once per step: gradients, new weights, and the tied embedding's gradient.

    As DeepSpeed 0.19 does it with ZeRO-1 and a pipeline: gradients are all-reduced, not scattered, in fp32
    (fp16 in fp16); then each rank's part of the new weights is gathered.  Calls are those of one bucket (5e7
    or 5e8 elements); a larger stage has more, of the same bytes.
    """
    own, padded = stage_parameters(config, stage), padded_parameters(config, stage, data_size)
    element, accumulated = ELEMENT[precision], ELEMENT[precision] if precision == "fp16" else FP32
    # BF16_Optimizer keeps its accumulated gradients padded, ZeRO's own optimizer does not.
    summed = padded if precision == "bf16" else own
    step = [
        Traffic(GRADIENTS, "all-reduce", data_size, summed * accumulated),
        Traffic(WEIGHTS, "all-gather", data_size, padded * element),
    ]
    if config.parallel.pipeline > 1 and any(ends(config, stage)):
        size = config.model.vocab_size // config.parallel.tensor * config.model.hidden_size * accumulated
        step.append(Traffic(TIED_EMBEDDING, "all-reduce", 2, size))
    return step


def ends(config: RunConfig, stage: int) -> tuple[bool, bool]:
    """Whether a pipeline stage is the first, which has the embedding, and the last, with head and loss."""
    return stage == 0, stage == config.parallel.pipeline - 1


def stage_parameters(config: RunConfig, stage: int) -> int:
    """Parameters that a rank of a pipeline stage holds; first and last both hold the embedding."""
    model, (first, last) = config.model, ends(config, stage)
    layers = stage_layers(config)[stage]
    embedding = model.vocab_size * model.hidden_size if first or last else 0
    split = layers * product_weights(model) + embedding
    whole = layers * norm_weights(model) + (2 * model.hidden_size if last else 0)
    return split // config.parallel.tensor + whole


def padded_parameters(config: RunConfig, stage: int, data_size: int) -> int:
    """The same as ZeRO lays them out: filled up so that the ranks' parts are equal and begin aligned."""
    aligned = 2 * data_size
    return -(-stage_parameters(config, stage) // aligned) * aligned


def stage_traffic(
    config: RunConfig, precision: str, data_size: int, stage: int
) -> tuple[list[Traffic], list[Traffic]]:
    """What a rank of a pipeline stage exchanges for each micro-batch, and besides once in a step."""
    each = tensor_traffic(config, precision, stage) + pipeline_traffic(config, precision, stage)
    return each, data_traffic(config, precision, data_size, stage)
