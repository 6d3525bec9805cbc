"""The three score norms of Pattention, forward and backward, on whatever is fastest where the scores are.

With A the scores, [rows, n], tau a number, N the numerators, T their row total, and c the row's scale:

| kind           | N(A)         | T(A)      | c            | weights S(A)          |
|----------------|--------------|-----------|--------------|-----------------------|
| `l2_norm_gelu` | A            | sum_j N^2 | tau / sqrt T | gelu(Z), Z = c A      |
| `gelu_l2_norm` | gelu(A)      | sum_j N^2 | tau / sqrt T | c N                   |
| `softmax`      | exp(A - max) | sum_j N   | tau^2 / T    | c N                   |

(arXiv 2410.23168, equation 6 and table 5; GELU is the exact one.)  With G the gradient of S, and all sums
over the n tokens of a row, the gradient of A follows from the chain rule through N and through T:

| kind           | D                   | row sum R | gradient of A             |
|----------------|---------------------|-----------|---------------------------|
| `l2_norm_gelu` | G * gelu'(Z)        | sum_j D A | c (D - A R / T)           |
| `gelu_l2_norm` | G                   | sum_j D N | c (D - N R / T) gelu'(A)  |
| `softmax`      | G                   | sum_j D N | c N (D - R / T)           |

For the first: dZ/dA is c along the diagonal, and c depends on A by dc/dA_j = -c A_j / T.  For the second the
same with N for A, then dN/dA = gelu'(A).  For the third: dS_i/dA_j = c N_i (1[i = j] - N_j / T); the maximum
cancels.  A row whose total is 0 has weights 0 and gradients 0.

So all that backward needs beside A is a number or two of each row, `stats`: T, and for softmax the maximum.
The tokens of a row may be spread over ranks.  Then the two sums over tokens, T and R, are sums over ranks
too, and both passes come apart there: `row_stats`, the ranks' sum, `weights`; and `row_sums`, the ranks'
sum, `gradients_`.  Where a row is whole, the second of each pair makes the sum itself.

Arithmetic is in fp32 (fp64 for fp64), whatever the scores are stored in.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_tokenformer.config.schema import ScoreNorm
from megatron_tokenformer.kernels import eager


def row_stats(scores: Tensor, kind: ScoreNorm) -> Tensor:
    """T over the tokens that are here, and for softmax their maximum: [1 or 2, rows], fp32 or wider.

    Args:
        scores: A, [rows, n]; rows may be any number of elements apart, tokens are next to each other.
    """
    return implementation(scores).row_stats(scores, kind)


def weights(
    scores: Tensor, tau: float, kind: ScoreNorm, stats: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S, [rows, n] in the scores' dtype, and the rows' stats.

    Args:
        scores: A, [rows, n], as in `row_stats`.
        stats: of the rows over all ranks, [1 or 2, rows]; by default those of the tokens that are here.
    """
    return implementation(scores).weights(scores, tau, kind, stats)


def row_sums(scores: Tensor, grad: Tensor, tau: float, kind: ScoreNorm, stats: Tensor) -> Tensor:
    """R over the tokens that are here: [rows], fp32 or wider.

    Args:
        scores: A, [rows, n], as in `row_stats`.
        grad: G, [rows, n], likewise.
        stats: as `weights` returned them, [1 or 2, rows].
    """
    return implementation(scores).row_sums(scores, grad, tau, kind, stats)


def gradients_(
    scores: Tensor, grad: Tensor, tau: float, kind: ScoreNorm, stats: Tensor, sums: Tensor | None = None
) -> Tensor:
    """Overwrite `grad`, the gradient of S, with that of A; return S once more, [rows, n].

    Args:
        scores: A, [rows, n], as in `row_stats`.
        grad: G, [rows, n], likewise.
        stats: as `weights` returned them, [1 or 2, rows].
        sums: R of the rows over all ranks, [rows]; by default those of the tokens that are here.
    """
    return implementation(scores).gradients_(scores, grad, tau, kind, stats, sums)


def implementation(scores: Tensor) -> ModuleType:
    """Triton's kernels for what a GPU holds in 16 or 32 bits, where Triton is installed; else torch."""
    if scores.is_cuda and scores.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return _triton_kernels() or eager
    return eager


@lru_cache(maxsize=1)
def _triton_kernels() -> ModuleType | None:
    """Imported where it is used: it takes a second, and builds of torch without CUDA come without Triton."""
    try:
        from megatron_tokenformer.kernels import triton_kernels
    except ModuleNotFoundError as missing:
        if missing.name != "triton":
            raise
        return None
    return triton_kernels
