"""What a GPU holds in a training step, by kind, from the configuration alone.

Weights and optimizer are what DeepSpeed 0.19.8 allocates under ZeRO-1; `tests/config/test_memory.py` counts
them in running engines.  Activations are those of `activations.py`, of all micro-batches under way.
"""

from __future__ import annotations

from megatron_tokenformer.config.activations import (
    backward_at_work,
    between,
    document_mask,
    layer_activations,
    logits,
)
from megatron_tokenformer.config.pipeline_cut import stage_layers
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import resolved_precision
from megatron_tokenformer.config.traffic import ELEMENT, padded_parameters, stage_parameters

REDUCE_BUCKET = 50_000_000
"""elements of the buffer that gradients are reduced in without bf16; DeepSpeed's `reduce_bucket_size`"""


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


def activations(config: RunConfig, stage: int, micro_batches: int) -> dict[str, int]:
    """Bytes of a rank's activations at their most, by kind: kept by layers, at work in one, ends.

    Args:
        micro_batches: of a step.  Under 1F1B stage i of p keeps those of at most p - i.
    """
    stages = config.parallel.pipeline
    under_way = min(stages - stage, micro_batches)
    recompute = config.training.recompute
    layers = stage_layers(config)[stage]
    found = {
        "activations": under_way * layers * layer_activations(config, recompute),
        "backward at work": (layers > 0) * backward_at_work(config, recompute),
    }
    if recompute == "layer":
        # DeepSpeed's checkpoint hands on another tensor of positions, for which a layer makes its own mask.
        again = layer_activations(config, "none") + document_mask(config)
        found["recomputed layer"] = (layers > 0) * again
    if config.data.isolate_documents:
        found["document masks"] = (layers > 0) * under_way * document_mask(config)
    if stage == stages - 1:
        found["logits"] = logits(config)
    if stages > 1:
        # What came and what went of each micro-batch under way, and the buffers for what comes.
        found["stage borders"] = between(config) * (2 * max(under_way, 2) + 2)
    return found


def memory(config: RunConfig, stage: int, data_ranks: int, micro_batches: int) -> dict[str, int]:
    """Bytes that a GPU of this stage holds at its fullest, by kind."""
    return model_states(config, stage, data_ranks) | activations(config, stage, micro_batches)


def fullest_stage(config: RunConfig, data_ranks: int, micro_batches: int) -> tuple[int, dict[str, int]]:
    """The stage whose GPUs hold most, and what they hold."""
    by_stage = {
        stage: memory(config, stage, data_ranks, micro_batches) for stage in range(config.parallel.pipeline)
    }
    return max(by_stage.items(), key=lambda found: sum(found[1].values()))


def _largest_parameter(config: RunConfig) -> int:
    model = config.model
    rows = 4 * model.hidden_size if model.is_dense else max(model.tokens.model_dump().values())
    return max(model.vocab_size, rows) // config.parallel.tensor * model.hidden_size
