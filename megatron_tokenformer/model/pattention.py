"""Pattention: attention between the input and learnable parameter tokens, in place of a linear layer.

    Pattention(X; K, V) = S(X K^T) V        X: [..., d_in]  K: [n, d_in]  V: [n, d_out]

(arXiv 2410.23168, equations 4 to 6.)  S is one of the score norms in `kernels/score_norm.py`.  Tensor
parallelism splits the n tokens: a rank's scores are its own, the row totals inside S are summed over ranks,
and what comes out is a part of a sum, which the caller reduces where it suits the next operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_tokenformer.config.schema import ScoreNorm
from megatron_tokenformer.model.pattend import pattend
from megatron_tokenformer.parallel.collectives import (
    TensorParallel,
    copy_to_ranks,
    sum_from_ranks,
)


class Pattention(nn.Module):
    """A projection from d_in to d_out through n parameter tokens; usable alone, in anybody's model.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        tokens: n, the parameter tokens; divisible by the tensor-parallel size.
        score_norm: how scores become weights.
        ranks: the ranks that the tokens are split over; by default the layer is whole.
        recompute_scores: compute the scores again in the backward pass instead of keeping them.

    `tau` is a plain number that starts at sqrt(n) and is set from outside when a model has grown: it
    belongs to the function that the model computes, not to the present number of tokens.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        tokens: int,
        score_norm: ScoreNorm = "l2_norm_gelu",
        ranks: TensorParallel = TensorParallel(),
        recompute_scores: bool = False,
    ) -> None:
        super().__init__()
        if tokens % ranks.size:
            raise ValueError(f"{tokens} parameter tokens cannot be split over {ranks.size} ranks")
        self.tokens, self.kind, self.ranks = tokens, score_norm, ranks
        self.recompute_scores = recompute_scores
        self.tau = math.sqrt(tokens)
        local = len(ranks.rows(tokens))
        self.key_tokens = nn.Parameter(torch.empty(local, d_in))
        self.value_tokens = nn.Parameter(torch.empty(local, d_out))
        self.reset_parameters()

    def reset_parameters(self, key_std: float = 0.02, value_std: float = 0.02) -> None:
        """Draw K and V from normal distributions of these standard deviations."""
        nn.init.normal_(self.key_tokens, std=key_std)
        nn.init.normal_(self.value_tokens, std=value_std)

    def partial(self, x: Tensor) -> Tensor:
        """This rank's part of the output, [..., d_out]; the output is the sum over ranks."""
        return partials(x, [self])[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out], the same on every rank."""
        return sum_from_ranks(self.partial(copy_to_ranks(x, self.ranks)), self.ranks)

    def get_extra_state(self) -> Tensor:
        """tau travels in the state dict: K and V alone do not say which function this is."""
        return torch.tensor(self.tau, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Called by load_state_dict."""
        self.tau = float(state)

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, score_norm={self.kind}, tau={self.tau:g}"


@torch.compiler.disable
def partials(x: Tensor, layers: Sequence[Pattention]) -> list[Tensor]:
    """This rank's part of the output of each of several alike layers of one input, with one sum of totals.

    Opaque to torch.compile: its passes are written out and fused already, and a tau that moves would be a new
    constant to compile for at every step.
    """
    first = layers[0]
    return pattend(
        x,
        [layer.key_tokens for layer in layers],
        [layer.value_tokens for layer in layers],
        [layer.tau for layer in layers],
        first.kind,
        first.ranks,
        first.recompute_scores,
    )
