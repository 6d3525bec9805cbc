"""The language model as the list of layers that DeepSpeed cuts into pipeline stages, and its loss.

Where documents are isolated, every layer needs the positions, but only the first stage reads the data: they
travel beside the activations, from layer to layer and from stage to stage.
"""

from __future__ import annotations

from collections.abc import Callable

from deepspeed.pipe import LayerSpec, TiedLayerSpec
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor, nn

from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.model.ends import Embedding, FinalNorm
from megatron_tokenformer.model.language_model import build_layer
from megatron_tokenformer.parallel.collectives import TensorParallel

Carried = Tensor | tuple[Tensor, Tensor]
"""What a layer hands to the next: activations, or (activations, positions [b, s])."""


class PipelineLayer(nn.Module):
    """A layer that hands on the positions, if there are any, with its activations."""

    def __init__(self, model: Model, ranks: TensorParallel, index: int, recompute_scores: bool) -> None:
        super().__init__()
        self.layer = build_layer(model, ranks, index, recompute_scores)

    def forward(self, carried: Carried) -> Carried:
        x, positions = carried if isinstance(carried, tuple) else (carried, None)
        return with_positions(self.layer(x, positions), positions)


def embed(embedding: Embedding, inputs: Carried) -> Carried:
    """Ids [b, s], or (ids, positions), to what the first layer takes."""
    tokens, positions = inputs if isinstance(inputs, tuple) else (inputs, None)
    return with_positions(embedding(tokens), positions)


def with_positions(x: Tensor, positions: Tensor | None) -> Carried:
    """Activations as they travel: alone where there are no positions."""
    return x if positions is None else (x, positions)


def without_positions(carried: Carried) -> Tensor:
    """What the last layer hands on to the head, which needs no positions."""
    return carried[0] if isinstance(carried, tuple) else carried


def pipeline_layers(
    model: Model, ranks: TensorParallel, recompute_scores: bool = False
) -> list[LayerSpec | Callable[[Carried], Tensor]]:
    """The same model as layers for a PipelineModule; embedding and head are one tied weight.

    With `recompute_scores` the backward pass computes the Pattentions' scores again instead of keeping them.
    """
    return [
        TiedLayerSpec("embedding", Embedding, model, ranks, forward_fn=embed),
        *(LayerSpec(PipelineLayer, model, ranks, i, recompute_scores) for i in range(model.layers)),
        without_positions,
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
