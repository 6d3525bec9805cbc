"""What layers and head hold of a micro-batch, in bytes, from the configuration alone.

It is what `model/` keeps for backward, and takes while backward is at work.  Both are counted in running
layers by `tests/config/test_activations.py`.
"""

from __future__ import annotations

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import (
    CHUNK_SCORES,
    chunk_rows,
    micro_batch_tokens,
    pattention_tokens,
    resolved_precision,
)
from megatron_tokenformer.config.traffic import ELEMENT, FP32


def layer_activations(config: RunConfig, recompute: str) -> int:
    """Bytes that one layer keeps of one micro-batch on one rank, from forward to backward.

    Args:
        recompute: `none`, `scores` (nothing kept depends on the number of parameter tokens) or `layer`.
    """
    if recompute == "layer":
        return between(config)
    of_layer = _transformer_keeps if config.model.is_dense else _tokenformer_keeps
    return of_layer(config, recompute) + _attention_keeps(config)


def _tokenformer_keeps(config: RunConfig, recompute: str) -> int:
    model, tensor = config.model, config.parallel.tensor
    element, tokens = ELEMENT[resolved_precision(config)], micro_batch_tokens(config)
    # What both norms and the three inputs of Pattentions (q, k and v share one) are computed from, and v.
    # Over ranks v is in one block with q and k as they were.
    kept = 2 * between(config) + 3 * _inside(config) + (3 if tensor > 1 else 1) * _inside(config) // tensor
    # Of each row of scores its stats; of both norms mean and deviation.
    stats = 2 if model.score_norm == "softmax" else 1
    kept += FP32 * 5 * stats * tokens + 2 * 2 * element * tokens_between(config)
    if recompute == "none":
        kept += element * tokens * pattention_tokens(model) // tensor
    return kept


def _transformer_keeps(config: RunConfig, recompute: str) -> int:
    model, tensor = config.model, config.parallel.tensor
    element = ELEMENT[resolved_precision(config)]
    # What both norms are computed from, what they give, q, k and v in one block, and what heads give, joined.
    kept = 2 * between(config) + 2 * _inside(config) + 4 * _inside(config) // tensor
    # What is four times as wide, before GELU and after; and the weights of q, k and v, joined.
    kept += 8 * _inside(config) // tensor + element * 3 * model.hidden_size**2 // tensor
    return kept + 2 * 2 * element * tokens_between(config)


def _attention_keeps(config: RunConfig) -> int:
    """Rotated q and k, the output, and a number for each row of scores."""
    rows = FP32 * micro_batch_tokens(config) * config.model.attention_heads
    return (3 * _inside(config) + rows) // config.parallel.tensor


def document_mask(config: RunConfig) -> int:
    """Bytes of what isolates the documents of a micro-batch: a mask that all layers of a stage share."""
    if not config.data.isolate_documents:
        return 0
    return ELEMENT[resolved_precision(config)] * micro_batch_tokens(config) * config.data.sequence_length


def backward_at_work(config: RunConfig, recompute: str, chunk_scores: int = CHUNK_SCORES) -> int:
    """Bytes in a layer's backward pass beside what was kept, where it takes most.

    Less than this, if that is not the FFN: what was kept of the FFN is free before the others' turn.

    Args:
        recompute: as in `layer_activations`.
        chunk_scores: the most scores of one projection at a time, with `scores`.
    """
    output_and_gradient = 2 * _inside(config)
    if config.model.is_dense:
        return output_and_gradient + _mlp_at_work(config)
    tokens, tensor = config.model.tokens, config.parallel.tensor
    sizes = ((3, tokens.qkv), (1, tokens.output), (1, tokens.ffn))
    chunk = chunk_scores if recompute == "scores" else None
    gradient_of_input = _inside(config)
    return (
        output_and_gradient
        + gradient_of_input
        + max(_pattentions_at_work(config, projections, n // tensor, chunk) for projections, n in sizes)
    )


def _mlp_at_work(config: RunConfig) -> int:
    """The gradients of what is four times as wide, and of the weight that follows it."""
    weight = ELEMENT[resolved_precision(config)] * 4 * config.model.hidden_size**2
    return (4 * _inside(config) + weight) // config.parallel.tensor


def _pattentions_at_work(config: RunConfig, projections: int, n: int, chunk_scores: int | None) -> int:
    """Of so many Pattentions of one input, with n tokens each on a rank.

    Args:
        chunk_scores: as in `backward_at_work`; None where scores are kept.
    """
    element, rows = ELEMENT[resolved_precision(config)], micro_batch_tokens(config)
    chunk = rows if chunk_scores is None else min(rows, chunk_rows(n, chunk_scores))
    # Of a score its gradient, its weight, and if it was not kept itself.
    parts = 2 if chunk_scores is None else 3
    numbers = 2 * projections * n * config.model.hidden_size  # of K and V, whose gradients are on their way
    gradients = element * numbers
    if chunk < rows:
        # They are summed over chunks, those of one chunk, in 16 bits, coming one by one.
        gradients = FP32 * numbers + (element * n * config.model.hidden_size if element < FP32 else 0)
    elif config.parallel.tensor > 1:
        parts += (parts - 1) * (projections - 1)  # all of one input wait for one sum over ranks
    return element * parts * chunk * n + gradients


def logits(config: RunConfig) -> int:
    """Bytes of a micro-batch's logits on a rank of the last stage, with the head's input.

    In 16 bits there are three: as computed, their softmax in fp32, and their gradient; in fp32 all are one.
    """
    element = ELEMENT[resolved_precision(config)]
    each = 4 if element == 4 else element + 4 + element
    vocabulary = config.model.vocab_size // config.parallel.tensor
    return micro_batch_tokens(config) * (each * vocabulary + 2 * element * config.model.hidden_size)


def tokens_between(config: RunConfig) -> int:
    """Those that a rank has between what is split: its part of them under sequence parallelism."""
    return micro_batch_tokens(config) // (config.parallel.tensor if config.parallel.sequence else 1)


def between(config: RunConfig) -> int:
    """Bytes of one activation between Pattentions, or between what is split of a dense layer."""
    return ELEMENT[resolved_precision(config)] * config.model.hidden_size * tokens_between(config)


def _inside(config: RunConfig) -> int:
    """Bytes of one of the whole micro-batch."""
    return ELEMENT[resolved_precision(config)] * config.model.hidden_size * micro_batch_tokens(config)
