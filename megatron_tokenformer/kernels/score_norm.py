"""The three score norms of Pattention, each in two halves around the sum over a row's tokens.

With A the scores, [..., n], and tau a number:

| kind           | numerator N(A)   | row total T(A) | weights S                          |
|----------------|------------------|----------------|------------------------------------|
| `l2_norm_gelu` | A                | sum A^2        | gelu(tau A / sqrt T)               |
| `gelu_l2_norm` | gelu(A)          | sum gelu(A)^2  | tau gelu(A) / sqrt T               |
| `softmax`      | exp(A - max A)   | sum exp(.)     | tau^2 exp(A - max A) / T           |

(arXiv 2410.23168, equation 6 and table 5; GELU is the exact one.)  The halves exist because the tokens of a
row may be spread over ranks: each computes the total of its own, and the sum of these normalises all.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tokenformer.config.schema import ScoreNorm

KINDS: tuple[str, ...] = get_args(ScoreNorm)


def numerators(scores: Tensor, kind: ScoreNorm, row_max: Tensor | None = None) -> Tensor:
    """N(A): [..., n] in the scores' dtype.  `row_max`, [..., 1], is only read by `softmax`."""
    if kind == "l2_norm_gelu":
        return scores
    if kind == "gelu_l2_norm":
        return F.gelu(scores)
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
