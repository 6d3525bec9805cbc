"""What both architectures have: the ways into and out of a split, embedding and head, norms with parameters.

Activations between layers are [s, b, d], or [s / p, b, d] on each of p ranks under sequence parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.parallel.collectives import (
    TensorParallel,
    copy_to_ranks,
    gather_from_ranks,
    scatter_sum,
    sum_from_ranks,
)


def enter_split(x: Tensor, ranks: TensorParallel) -> Tensor:
    """Into what is split over ranks (a Pattention, a product): every rank gets all positions."""
    return gather_from_ranks(x, ranks, dim=0) if ranks.sequence else copy_to_ranks(x, ranks)


def leave_split(partial: Tensor, ranks: TensorParallel) -> Tensor:
    """Out of it: sum the ranks' parts; under sequence parallelism keep this rank's positions."""
    return scatter_sum(partial, ranks, dim=0) if ranks.sequence else sum_from_ranks(partial, ranks)


class Embedding(nn.Module):
    """The table of token embeddings, split over ranks by vocabulary; also the weight of the head.

    A lookup of a dozen lines rather than megatron-core's, which cannot scatter onto the sequence off the
    GPU and needs a process group even for one process.
    """

    canonical_name = "embedding"

    def __init__(self, model: Model, ranks: TensorParallel) -> None:
        super().__init__()
        self.ranks, self.rows = ranks, ranks.rows(model.vocab_size)
        self.weight = nn.Parameter(torch.empty(len(self.rows), model.hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids [b, s] to vectors [s, b, d]."""
        local = tokens.t() - self.rows.start
        elsewhere = (local < 0) | (local >= len(self.rows))
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return leave_split(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.ranks)

    def logits(self, x: Tensor) -> Tensor:
        """Vectors [s, b, d] to this rank's slice of the logits, [s, b, v / p]."""
        return F.linear(enter_split(x, self.ranks), self.weight)


class LayerNorm(nn.Module):
    """LayerNorm with parameters, of which the gain is stored minus one.

    So weight decay draws it to the identity, as it does for every other parameter here, and the optimizer
    needs no second group: a group that exists on the last pipeline stage alone would hang DeepSpeed.
    """

    def __init__(self, model: Model, ranks: TensorParallel) -> None:
        super().__init__()
        self.ranks, self.eps = ranks, model.layer_norm_eps
        self.gain_minus_one = nn.Parameter(torch.zeros(model.hidden_size))
        self.bias = nn.Parameter(torch.zeros(model.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        parameters: tuple[Tensor, ...] = self.gain_minus_one, self.bias
        if self.ranks.sequence:  # each rank sees some positions: the gradients of all are summed, in one call
            parameters = copy_to_ranks(torch.stack(parameters), self.ranks).unbind()
        gain_minus_one, bias = parameters
        return F.layer_norm(x, bias.shape, 1.0 + gain_minus_one, bias, self.eps)


class FinalNorm(LayerNorm):
    """Before the head."""

    canonical_name = "final_norm"
