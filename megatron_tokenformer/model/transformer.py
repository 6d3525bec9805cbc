"""The dense Transformer layer: a GPT in the same engine, to compare a Tokenformer of equal size with.

Pre-norm, no biases in its products, an MLP of four times the width with exact GELU; embedding, rotary
embedding, attention of heads and final norm are the Tokenformer's.  Tensor parallelism is Megatron's (arXiv
1909.08053): heads and the MLP's inner channels are split, so what is split is entered and left twice a layer.

Every parameter splits on its rows.  What takes a whole input stores its weight [out, in] and a rank has some
of the outputs; what takes a split input stores it transposed, [in, out], and a rank has some of the inputs.
Query, key and value are three parameters, so that a rank's rows of each are whole heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.model.attention import attend
from megatron_tokenformer.model.ends import LayerNorm, enter_split, leave_split
from megatron_tokenformer.parallel.collectives import TensorParallel

if TYPE_CHECKING:
    from megatron_tokenformer.model.cache import Past


class TransformerLayer(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)); activations are as between Tokenformer layers."""

    def __init__(self, model: Model, ranks: TensorParallel, index: int) -> None:
        super().__init__()
        self.canonical_name = f"layers.{index}"
        self.ranks = ranks
        self.attention_norm = LayerNorm(model, ranks)
        self.attention = DenseAttention(model, ranks)
        self.mlp_norm = LayerNorm(model, ranks)
        self.mlp = Mlp(model, ranks)

    def forward(self, x: Tensor, positions: Tensor | None = None, past: Past | None = None) -> Tensor:
        attended = self.attention(enter_split(self.attention_norm(x), self.ranks), positions, past)
        x = x + leave_split(attended, self.ranks)
        return x + leave_split(self.mlp(enter_split(self.mlp_norm(x), self.ranks)), self.ranks)


class DenseAttention(nn.Module):
    """Multi-head causal attention, [s, b, d] to this rank's part of [s, b, d]."""

    def __init__(self, model: Model, ranks: TensorParallel) -> None:
        super().__init__()
        self.head_size, self.rotary_size = model.head_size, model.rotary_size
        d, local = model.hidden_size, len(ranks.rows(model.hidden_size))
        self.query, self.key, self.value, self.output = (Weight(local, d) for _ in range(4))

    def forward(self, x: Tensor, positions: Tensor | None = None, past: Past | None = None) -> Tensor:
        """Attend to earlier positions: all of them, or with `positions` [b, s] those of the same document."""
        joined = torch.cat([part.weight for part in (self.query, self.key, self.value)])
        query, key, value = F.linear(x, joined).chunk(3, dim=-1)  # one product reads x once
        context = attend(query, key, value, self.head_size, self.rotary_size, positions, past)
        return context @ self.output.weight


class Mlp(nn.Module):
    """gelu(x U^T) D, [s, b, d] to this rank's part of [s, b, d]."""

    def __init__(self, model: Model, ranks: TensorParallel) -> None:
        super().__init__()
        local = len(ranks.rows(4 * model.hidden_size))
        self.up, self.down = Weight(local, model.hidden_size), Weight(local, model.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, self.up.weight)) @ self.down.weight


class Weight(nn.Module):
    """One matrix, of which this rank has some rows."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
