"""The language model as one module, and the names, shapes and initial values of its parameters.

A parameter's canonical name is its name in `LanguageModel`: `layers.3.attention.query.key_tokens`.  It says
nothing of stages or ranks; checkpoints, initial values and growth go by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor, nn

from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.model.cache import Cache
from megatron_tokenformer.model.ends import Embedding, FinalNorm
from megatron_tokenformer.model.initialization import normal_rows
from megatron_tokenformer.model.tokenformer import TokenformerLayer
from megatron_tokenformer.model.transformer import TransformerLayer
from megatron_tokenformer.parallel.collectives import TensorParallel


def build_layer(
    model: Model, ranks: TensorParallel, index: int, recompute_scores: bool = False
) -> TokenformerLayer | TransformerLayer:
    """Layer `index` of the model's architecture; `recompute_scores` is of Pattentions alone."""
    if model.is_dense:
        return TransformerLayer(model, ranks, index)
    return TokenformerLayer(model, ranks, index, recompute_scores)


class LanguageModel(nn.Module):
    """Ids [b, s] to this rank's slice of the logits, [s, b, v / p], in one process per tensor rank.

    With `positions` [b, s], each token's place in its document, documents do not see each other.
    """

    def __init__(self, model: Model, ranks: TensorParallel = TensorParallel()) -> None:
        super().__init__()
        self.embedding = Embedding(model, ranks)
        self.layers = nn.ModuleList(build_layer(model, ranks, i) for i in range(model.layers))
        self.final_norm = FinalNorm(model, ranks)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.embedding.logits(self.hidden(tokens, positions))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the head takes, [s, b, d] (under sequence parallelism this rank's positions of it).

        With a `cache` the tokens are those that come after what it has read.
        """
        pasts = cache.read(tokens.shape[1]) if cache is not None else repeat(None)
        x = self.embedding(tokens)
        for layer, past in zip(self.layers, pasts):
            x = layer(x, positions, past)
        return self.final_norm(x)


def canonical_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters inside `module` (a stage, or a whole model) with their canonical names."""
    for part in module.modules():
        name = getattr(part, "canonical_name", None)
        if name is not None:
            yield from ((f"{name}.{inner}", p) for inner, p in part.named_parameters())


def full_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the unsplit model, by canonical name."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in LanguageModel(model).named_parameters()}


def initial_std(model: Model, name: str) -> float:
    """Standard deviation of a parameter's initial values.

    A Tokenformer's are those of the published models; a dense model's are GPT-2's, where what is added to the
    residual stream is smaller the more layers add to it.
    """
    if name.endswith("value_tokens"):
        return 2.0 / (model.layers * math.sqrt(model.hidden_size))
    if name.endswith((".attention.output.weight", ".mlp.down.weight")):
        return 0.02 / math.sqrt(2 * model.layers)
    return 0.0 if name.endswith(("norm.gain_minus_one", "norm.bias")) else 0.02


@torch.no_grad()
def initialize(module: nn.Module, model: Model, seed: int, ranks: TensorParallel) -> None:
    """Give this rank's part of every parameter the values that the unsplit model would start with."""
    shapes = full_shapes(model)
    for name, parameter in canonical_parameters(module):
        std = initial_std(model, name)
        if std == 0.0:
            parameter.zero_()
        else:
            rows, columns = shapes[name]
            parameter.copy_(normal_rows(seed, name, ranks.rows(rows), columns, std))
