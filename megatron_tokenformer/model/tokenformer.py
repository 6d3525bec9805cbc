"""The Tokenformer layer.

Activations between layers are [s, b, d], or [s / p, b, d] on each of p ranks under sequence parallelism.
Positions, where they are given, are those of the whole sequence on every rank: [b, s].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.model.attention import Attention
from megatron_tokenformer.model.ends import enter_split, leave_split
from megatron_tokenformer.model.pattention import Pattention
from megatron_tokenformer.parallel.collectives import TensorParallel

if TYPE_CHECKING:
    from megatron_tokenformer.model.cache import Past


class TokenformerLayer(nn.Module):
    """x + Attention(LN(x)), then x + Pattention(LN(x)); the norms have no parameters."""

    def __init__(
        self, model: Model, ranks: TensorParallel, index: int, recompute_scores: bool = False
    ) -> None:
        super().__init__()
        self.canonical_name = f"layers.{index}"
        self.ranks, self.width, self.eps = ranks, (model.hidden_size,), model.layer_norm_eps
        self.attention = Attention(model, ranks, recompute_scores)
        d, tokens = model.hidden_size, model.tokens
        self.ffn = Pattention(d, d, tokens.ffn, model.score_norm, ranks, recompute_scores)

    def forward(self, x: Tensor, positions: Tensor | None = None, past: Past | None = None) -> Tensor:
        attended = self.attention(enter_split(self._norm(x), self.ranks), positions, past)
        x = x + leave_split(attended, self.ranks)
        return x + leave_split(self.ffn.partial(enter_split(self._norm(x), self.ranks)), self.ranks)

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.width, eps=self.eps)
