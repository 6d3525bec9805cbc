"""The language model as the list of layers that DeepSpeed cuts into pipeline stages, and its loss."""

from __future__ import annotations

from deepspeed.pipe import LayerSpec, TiedLayerSpec
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.model.tokenformer import Embedding, FinalNorm, TokenformerLayer
from megatron_tokenformer.parallel.collectives import TensorParallel


def pipeline_layers(model: Model, ranks: TensorParallel) -> list[LayerSpec]:
    """The same model as layers for a PipelineModule; embedding and head are one tied weight."""
    return [
        TiedLayerSpec("embedding", Embedding, model, ranks),
        *(LayerSpec(TokenformerLayer, model, ranks, i) for i in range(model.layers)),
        LayerSpec(FinalNorm, model, ranks),
        TiedLayerSpec("embedding", Embedding, model, ranks, forward_fn=Embedding.logits),
    ]


def language_model_loss(logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of [s, b, v / p] logits, summed with the weights given to each position.

    Args:
        logits: this rank's slice of the vocabulary; overwritten when fp32.
        labels: next tokens [b, s], and fp32 weights [b, s], 0 where a position does not count.  Weights
            are chosen so that the mean of this over micro-batches and data-parallel ranks is the mean over
            the counted positions of the global batch.
    """
    targets, weights = labels
    losses = vocab_parallel_cross_entropy(logits, targets.t().contiguous())
    return (losses * weights.t()).sum()
