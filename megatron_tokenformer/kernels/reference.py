"""The score norms in plain torch, differentiated by autograd: the definition that the fast ones are held to.

Each is in two halves around the sum over a row's tokens: numerators N(A) and their total T(A), then weights.
`score_norm.py` has the formulas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tokenformer.config.schema import ScoreNorm


def numerators(scores: Tensor, kind: ScoreNorm, row_max: Tensor | None = None) -> Tensor:
    """N(A): [..., n] in the scores' dtype.  `row_max`, [..., 1], is only read by `softmax`."""
    if kind == "l2_norm_gelu":
        return scores
    if kind == "gelu_l2_norm":
        return F.gelu(scores)
    assert row_max is not None  # softmax's callers have it
    return torch.exp(scores - row_max)


def row_totals(numerator: Tensor, kind: ScoreNorm) -> Tensor:
    """T(A): [..., 1], in fp32 or wider, over the tokens that are here."""
    wide = numerator.to(torch.promote_types(numerator.dtype, torch.float32))
    return (wide if kind == "softmax" else wide.square()).sum(dim=-1, keepdim=True)


def weights(numerator: Tensor, totals: Tensor, tau: float, kind: ScoreNorm) -> Tensor:
    """S: [..., n] in the numerator's dtype, from N(A) and the T(A) of the whole row, [..., 1].

    A row whose total is 0 has weights 0 and gradients 0.
    """
    some = totals > 0
    safe = torch.where(some, totals, 1.0)
    if kind == "softmax":
        return numerator * (tau**2 / safe).to(numerator.dtype)
    scale = torch.where(some, tau * safe.rsqrt(), 0.0).to(numerator.dtype)
    return F.gelu(numerator * scale) if kind == "l2_norm_gelu" else numerator * scale


def normalised_scores(scores: Tensor, tau: float, kind: ScoreNorm) -> Tensor:
    """S of scores, [..., n], that hold all tokens of each row."""
    row_max = scores.detach().amax(dim=-1, keepdim=True) if kind == "softmax" else None
    numerator = numerators(scores, kind, row_max)
    return weights(numerator, row_totals(numerator, kind), tau, kind)
