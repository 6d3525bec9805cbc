"""The score norms with torch's own operations: a few rows at a time, so that they stay in the cache.

Formulas, shapes and arguments are those of `score_norm.py`.  Each block of rows is read and written once;
the passes between happen in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_tokenformer.config.schema import ScoreNorm

CACHED = 1 << 18
"""Elements of a block: a few fp32 blocks at once fit in the cache, and calls cost little beside them."""


def row_stats(scores: Tensor, kind: ScoreNorm) -> Tensor:
    """See `score_norm.row_stats`."""
    stats = _new_stats(scores, kind)
    for rows in _blocks(scores):
        _stats_into(stats[:, rows], _wide(scores[rows]), kind)
    return stats


def weights(
    scores: Tensor, tau: float, kind: ScoreNorm, stats: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `score_norm.weights`."""
    found = _new_stats(scores, kind) if stats is None else stats
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    for rows in _blocks(scores):
        a = _wide(scores[rows])
        if stats is None:
            _stats_into(found[:, rows], a, kind)
        s = _buffer(out[rows], a)
        _weights_into(s, a, found[:, rows], tau, kind)
        if s.dtype != out.dtype:
            out[rows] = s
    return out, found


def row_sums(scores: Tensor, grad: Tensor, tau: float, kind: ScoreNorm, stats: Tensor) -> Tensor:
    """See `score_norm.row_sums`."""
    sums = torch.empty_like(stats[0])
    for rows in _blocks(scores):
        a, g = _wide(scores[rows]), _wide(grad[rows])
        if kind == "l2_norm_gelu":
            g = torch.ops.aten.gelu_backward(g, a * _scale(stats[:, rows], tau, kind))
            sums[rows] = torch.linalg.vecdot(g, a)
        else:
            sums[rows] = torch.linalg.vecdot(
                g, _numerators_into(torch.empty_like(a), a, stats[:, rows], kind)
            )
    return sums


def gradients_(
    scores: Tensor, grad: Tensor, tau: float, kind: ScoreNorm, stats: Tensor, sums: Tensor | None = None
) -> Tensor:
    """See `score_norm.gradients_`."""
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    for rows in _blocks(scores):
        a, g = _wide(scores[rows]), _wide(grad[rows])
        s = _buffer(out[rows], a)
        _gradients_into(g, s, a, tau, kind, stats[:, rows], None if sums is None else sums[rows])
        if s.dtype != out.dtype:
            out[rows], grad[rows] = s, g
    return out


def _stats_into(stats: Tensor, a: Tensor, kind: ScoreNorm) -> None:
    if kind == "l2_norm_gelu":
        stats[0] = torch.linalg.vecdot(a, a)
        return
    if kind == "softmax":
        stats[1] = a.amax(dim=-1)
    n = _numerators_into(torch.empty_like(a), a, stats, kind)
    stats[0] = n.sum(dim=-1) if kind == "softmax" else torch.linalg.vecdot(n, n)


def _numerators_into(out: Tensor, a: Tensor, stats: Tensor, kind: ScoreNorm) -> Tensor:
    """N of `gelu_l2_norm` and `softmax`; that of `l2_norm_gelu` is A itself."""
    if kind == "softmax":
        return torch.sub(a, stats[1].unsqueeze(-1), out=out).exp_()
    return torch.ops.aten.gelu.out(a, out=out)


def _weights_into(out: Tensor, a: Tensor, stats: Tensor, tau: float, kind: ScoreNorm) -> None:
    scale = _scale(stats, tau, kind)
    if kind == "l2_norm_gelu":
        torch.ops.aten.gelu_(torch.mul(a, scale, out=out))
    else:
        _numerators_into(out, a, stats, kind).mul_(scale)


def _gradients_into(
    g: Tensor, s: Tensor, a: Tensor, tau: float, kind: ScoreNorm, stats: Tensor, sums: Tensor | None
) -> None:
    """Turn G in `g` into the gradient of A, and fill `s` with S; `a` must be neither of them."""
    scale = _scale(stats, tau, kind)
    if kind == "l2_norm_gelu":
        torch.mul(a, scale, out=s)
        torch.ops.aten.gelu_backward.grad_input(g, s, grad_input=g)
        torch.ops.aten.gelu_(s)
        g.addcmul_(a, _share(g, a, stats, sums), value=-1).mul_(scale)
        return
    _numerators_into(s, a, stats, kind)
    share = _share(g, s, stats, sums)
    if kind == "gelu_l2_norm":
        g.addcmul_(s, share, value=-1).mul_(scale)
        torch.ops.aten.gelu_backward.grad_input(g, a, grad_input=g)
        s.mul_(scale)
    else:
        g.sub_(share).mul_(s.mul_(scale))


def _scale(stats: Tensor, tau: float, kind: ScoreNorm) -> Tensor:
    """c, [rows, 1], 0 where the total is."""
    total = stats[0].unsqueeze(-1)
    scale = tau**2 / total if kind == "softmax" else tau * total.rsqrt()
    return scale.masked_fill_(total == 0, 0.0)


def _share(d: Tensor, n: Tensor, stats: Tensor, sums: Tensor | None) -> Tensor:
    """R / T, [rows, 1], 0 where the total is."""
    if sums is None:
        sums = torch.linalg.vecdot(d, n)
    return (sums / stats[0]).masked_fill_(stats[0] == 0, 0.0).unsqueeze(-1)


def _new_stats(scores: Tensor, kind: ScoreNorm) -> Tensor:
    shape = (2 if kind == "softmax" else 1, len(scores))
    return scores.new_empty(shape, dtype=torch.promote_types(scores.dtype, torch.float32))


def _wide(x: Tensor) -> Tensor:
    """In the dtype of the arithmetic: a copy if `x` is narrower, else `x` itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _buffer(out: Tensor, like: Tensor) -> Tensor:
    """Where to compute what goes to `out`: there, if it has the dtype of the arithmetic."""
    return out if out.dtype == like.dtype else torch.empty_like(like)


def _blocks(scores: Tensor) -> Iterator[slice]:
    step = max(1, CACHED // max(scores.shape[1], 1))
    if scores.device.type != "cpu":
        step = max(len(scores), 1)  # on a GPU launches cost more than what a cache saves
    return (slice(first, first + step) for first in range(0, len(scores), step))
