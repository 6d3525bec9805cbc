"""What a GPU holds in a training step, by kind, from the configuration alone.

Weights and optimizer are what DeepSpeed 0.19.8 allocates under ZeRO-1; activations are what the layers of
`model/` keep for backward.  `tests/config/test_memory.py` counts both in running engines and layers.
"""

from __future__ import annotations

from megatron_tokenformer.config.schema import RunConfig, resolve_precision
from megatron_tokenformer.config.sizes import (
    CHUNK_SCORES,
    chunk_rows,
    micro_batch_tokens,
    pattention_tokens,
)
from megatron_tokenformer.config.stages import stage_layers
from megatron_tokenformer.config.traffic import ELEMENT, FP32, padded_parameters, stage_parameters

REDUCE_BUCKET = 50_000_000
"""elements of the buffer that gradients are reduced in without bf16; DeepSpeed's `reduce_bucket_size`"""


def resolved_precision(config: RunConfig) -> str:
    """The precision on a GPU: `auto` is bf16 there."""
    return resolve_precision(config.training.precision, "cuda")


def model_states(config: RunConfig, stage: int, data_ranks: int) -> dict[str, int]:
    """Bytes of a rank's weights, fp32 master weights, Adam's moments, gradients, and buffers of a moment.

    ZeRO-1 splits master weights and moments over data ranks, gradients not.  In bf16 they are there twice: as
    the backward pass of a micro-batch leaves them, and the fp32 sum over micro-batches.
    """
    precision = resolved_precision(config)
    element, numbers = ELEMENT[precision], stage_parameters(config, stage)
    padded = padded_parameters(config, stage, data_ranks)
    part = padded // data_ranks
    states = {"weights": element * padded, "master weights": 4 * part, "moments": 8 * part}
    if precision == "bf16":
        # One gradient is widened at a time, to be added.
        return states | {"gradients": 2 * numbers + 4 * padded, "buffers": 4 * _largest_parameter(config)}
    return states | {"gradients": element * numbers, "buffers": element * REDUCE_BUCKET + 4 * part}


def layer_activations(config: RunConfig, recompute: str) -> int:
    """Bytes that one layer keeps of one micro-batch on one rank, from forward to backward.

    Args:
        recompute: `none`, `scores` (nothing kept depends on the number of parameter tokens) or `layer`.
    """
    model, tensor = config.model, config.parallel.tensor
    element, tokens = ELEMENT[resolved_precision(config)], micro_batch_tokens(config)
    outside = element * model.hidden_size * _tokens_between(config)  # one activation between Pattentions
    inside = element * model.hidden_size * tokens
    if recompute == "layer":
        return outside
    # What both layer norms and the three inputs of Pattentions (q, k and v share one) are computed from.
    kept = 2 * outside + 3 * inside
    # Of attention q and k rotated, v and its output; over ranks v is in one block with q and k as they were.
    kept += (6 if tensor > 1 else 4) * inside // tensor + FP32 * tokens * model.attention_heads // tensor
    # Of each row of scores its stats; of both norms mean and deviation.
    stats = 2 if model.score_norm == "softmax" else 1
    kept += FP32 * 5 * stats * tokens + 2 * 2 * element * _tokens_between(config)
    if recompute == "none":
        kept += element * tokens * pattention_tokens(model) // tensor
    return kept


def activations(config: RunConfig, stage: int, micro_batches: int) -> dict[str, int]:
    """Bytes of a rank's activations at their most, by kind: kept by layers, at work in one, ends.

    Args:
        micro_batches: of a step.  Under 1F1B stage i of p keeps those of at most p - i.
    """
    stages = config.parallel.pipeline
    under_way = min(stages - stage, micro_batches)
    element, recompute = ELEMENT[resolved_precision(config)], config.training.recompute
    between = element * config.model.hidden_size * _tokens_between(config)
    layers = stage_layers(config)[stage]
    found = {
        "activations": under_way * layers * layer_activations(config, recompute),
        "backward at work": (layers > 0) * backward_at_work(config, recompute),
    }
    if recompute == "layer":
        found["recomputed layer"] = (layers > 0) * layer_activations(config, "none")
    if stage == stages - 1:
        found["logits"] = logits(config)
    if stages > 1:
        # What came and what went of each micro-batch under way, and the buffers for what comes.
        found["stage borders"] = between * (2 * max(under_way, 2) + 2)
    return found


def backward_at_work(config: RunConfig, recompute: str, chunk_scores: int = CHUNK_SCORES) -> int:
    """Bytes in a layer's backward pass beside what was kept, in the Pattentions of one input that take most.

    Less than this, if those are not the FFN's: what was kept of the FFN is free before the others' turn.

    Args:
        recompute: as in `layer_activations`.
        chunk_scores: the most scores of one projection at a time, with `scores`.
    """
    model, tokens, tensor = config.model, config.model.tokens, config.parallel.tensor
    element, rows = ELEMENT[resolved_precision(config)], micro_batch_tokens(config)

    def at_work(projections: int, n: int) -> int:
        chunk = min(rows, chunk_rows(n, chunk_scores)) if recompute == "scores" else rows
        # Of a score its gradient, its weight, and with `scores` itself.
        parts = 3 if recompute == "scores" else 2
        numbers = 2 * projections * n * model.hidden_size  # of K and V, whose gradients are on their way
        gradients = element * numbers
        if chunk < rows:
            # They are summed over chunks, those of one chunk, in 16 bits, coming one by one.
            gradients = FP32 * numbers + (element * n * model.hidden_size if element < FP32 else 0)
        elif tensor > 1:
            parts += (parts - 1) * (projections - 1)  # all of one input wait for one sum over ranks
        return element * parts * chunk * n + gradients

    # The output, its gradient, and that of the input.
    wide = 3 * element * rows * model.hidden_size
    sizes = ((3, tokens.qkv), (1, tokens.output), (1, tokens.ffn))
    return wide + max(at_work(projections, n // tensor) for projections, n in sizes)


def logits(config: RunConfig) -> int:
    """Bytes of a micro-batch's logits on a rank of the last stage, with the head's input.

    In 16 bits there are three: as computed, their softmax in fp32, and their gradient; in fp32 all are one.
    """
    element = ELEMENT[resolved_precision(config)]
    each = 4 if element == 4 else element + 4 + element
    vocabulary = config.model.vocab_size // config.parallel.tensor
    return micro_batch_tokens(config) * (each * vocabulary + 2 * element * config.model.hidden_size)


def memory(config: RunConfig, stage: int, data_ranks: int, micro_batches: int) -> dict[str, int]:
    """Bytes that a GPU of this stage holds at its fullest, by kind."""
    return model_states(config, stage, data_ranks) | activations(config, stage, micro_batches)


def fullest_stage(config: RunConfig, data_ranks: int, micro_batches: int) -> tuple[int, dict[str, int]]:
    """The stage whose GPUs hold most, and what they hold."""
    by_stage = {
        stage: memory(config, stage, data_ranks, micro_batches) for stage in range(config.parallel.pipeline)
    }
    return max(by_stage.items(), key=lambda found: sum(found[1].values()))


def _tokens_between(config: RunConfig) -> int:
    """Those that a rank has between Pattentions: its part of them under sequence parallelism."""
    return micro_batch_tokens(config) // (config.parallel.tensor if config.parallel.sequence else 1)


def _largest_parameter(config: RunConfig) -> int:
    model = config.model
    rows = max(model.vocab_size, *model.tokens.model_dump().values())
    return rows // config.parallel.tensor * model.hidden_size
