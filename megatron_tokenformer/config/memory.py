"""What a GPU holds in a training step, by kind, from the configuration alone.

Weights and optimizer are what DeepSpeed 0.19.8 allocates under ZeRO-1; activations are what the layers of
`model/` keep for backward.  `tests/config/test_memory.py` counts both in running engines and layers.
"""

from __future__ import annotations

import math

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import pattention_tokens
from megatron_tokenformer.config.stages import stage_layers

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
"""bytes of a weight or an activation"""

SCORE = {"bf16": 10, "fp16": 10, "fp32": 12}
"""bytes that a layer keeps of a score: itself, what is squared in fp32, what GELU is taken of, its weight"""

SCORE_AT_WORK = 8
"""bytes more of a score of the widest Pattention while its backward is at work, in all precisions"""

REDUCE_BUCKET = 50_000_000
"""elements of the buffer that gradients are reduced in without bf16; DeepSpeed's `reduce_bucket_size`"""


def resolved_precision(config: RunConfig) -> str:
    """The precision on a GPU: `auto` is bf16 there."""
    return "bf16" if config.training.precision == "auto" else config.training.precision


def stage_parameters(config: RunConfig, stage: int) -> int:
    """Numbers that a rank of this stage holds; the first and the last have the embedding, also the head."""
    model, tensor, last = config.model, config.parallel.tensor, config.parallel.pipeline - 1
    tokens = stage_layers(config)[stage] * pattention_tokens(model) // tensor
    embedding = model.vocab_size // tensor if stage in (0, last) else 0
    return (2 * tokens + embedding + 2 * (stage == last)) * model.hidden_size


def padded_parameters(config: RunConfig, stage: int, data_ranks: int) -> int:
    """The same as ZeRO lays them out: filled up so that the ranks' parts are equal and begin aligned."""
    return math.ceil(stage_parameters(config, stage) / (2 * data_ranks)) * 2 * data_ranks


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
        # Either one gradient widened to be added, or all of them narrowed to be summed over data ranks.
        buffers = max(4 * _largest_parameter(config), 2 * padded)
        return states | {"gradients": 2 * numbers + 4 * padded, "buffers": buffers}
    return states | {"gradients": element * numbers, "buffers": element * REDUCE_BUCKET + 4 * part}


def layer_activations(config: RunConfig, recompute: str) -> int:
    """Bytes that one layer keeps of one micro-batch on one rank, from forward to backward.

    Args:
        recompute: `none`, `scores` (nothing kept depends on the number of parameter tokens) or `layer`.
    """
    model, tensor = config.model, config.parallel.tensor
    element = ELEMENT[resolved_precision(config)]
    tokens = _tokens(config)
    outside = element * model.hidden_size * _tokens_between(config)  # one activation between Pattentions
    inside = element * model.hidden_size * tokens
    if recompute == "layer":
        return outside
    # What both layer norms and the three inputs of Pattentions (q, k and v share one) are computed from.
    kept = 2 * outside + 3 * inside
    # Of attention q and k rotated, its output, and v, which lies in one block with q and k unrotated.
    kept += 6 * inside // tensor + 4 * tokens * model.attention_heads // tensor
    # Of each row of scores the total, the scale, and whether there is one; of both norms mean and deviation.
    kept += tokens * 5 * (4 + element + 1) + 2 * 2 * element * _tokens_between(config)
    if recompute == "none":
        kept += SCORE[resolved_precision(config)] * tokens * pattention_tokens(model) // tensor
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
        "backward at work": (layers > 0) * backward_at_work(config),
    }
    if recompute == "layer":
        found["recomputed layer"] = (layers > 0) * layer_activations(config, "none")
    if stage == stages - 1:
        found["logits"] = logits(config)
    if stages > 1:
        # What came and what went of each micro-batch under way, and the buffers for what comes.
        found["stage borders"] = between * (2 * max(under_way, 2) + 2)
    return found


def backward_at_work(config: RunConfig) -> int:
    """Bytes of gradients on their way through a layer where they are most: in its widest Pattention."""
    widest = max(config.model.tokens.model_dump().values())
    return SCORE_AT_WORK * _tokens(config) * widest // config.parallel.tensor


def logits(config: RunConfig) -> int:
    """Bytes of a micro-batch's logits on a rank of the last stage, with the head's input.

    In 16 bits there are three: as computed, their softmax in fp32, and their gradient; in fp32 all are one.
    """
    element = ELEMENT[resolved_precision(config)]
    each = 4 if element == 4 else element + 4 + element
    vocabulary = config.model.vocab_size // config.parallel.tensor
    return _tokens(config) * (each * vocabulary + 2 * element * config.model.hidden_size)


def memory(config: RunConfig, stage: int, data_ranks: int, micro_batches: int) -> dict[str, int]:
    """Bytes that a GPU of this stage holds at its fullest, by kind."""
    return model_states(config, stage, data_ranks) | activations(config, stage, micro_batches)


def fullest_stage(config: RunConfig, data_ranks: int, micro_batches: int) -> tuple[int, dict[str, int]]:
    """The stage whose GPUs hold most, and what they hold."""
    by_stage = {
        stage: memory(config, stage, data_ranks, micro_batches) for stage in range(config.parallel.pipeline)
    }
    return max(by_stage.items(), key=lambda found: sum(found[1].values()))


def _tokens(config: RunConfig) -> int:
    """Tokens of a micro-batch."""
    return config.training.micro_batch_size * config.data.sequence_length


def _tokens_between(config: RunConfig) -> int:
    """Those that a rank has between Pattentions: its part of them under sequence parallelism."""
    return _tokens(config) // (config.parallel.tensor if config.parallel.sequence else 1)


def _largest_parameter(config: RunConfig) -> int:
    model = config.model
    rows = max(model.vocab_size, *model.tokens.model_dump().values())
    return rows // config.parallel.tensor * model.hidden_size
