"""Pattention's forward and backward pass written out, so that both keep and move no more than they must.

    A = X K^T    S = weights(A)    Y = S V                                       (kernels/score_norm.py)
    dS = dY V^T    dV = S^T dY    dA = gradient of A    dK = dA^T X    dX = dA K

Autograd would keep A for the norm and S for the product with V.  Here backward makes S again from A while
it makes dA, so A is all that is kept with an n in its shape.  With `recompute_scores` not even that: backward
makes A again from X, one product more than the six above, and both passes go through X in chunks of rows, of
at most CHUNK_SCORES scores, so that neither what is kept nor the peak depends on n.  Where nothing needs a
gradient and tokens are whole, forward goes in chunks too, since it has nothing to keep.

Several projections of one X (query, key, value) share the ranks' sums: one all-reduce in forward (one more
for the maximum of softmax) and one in backward, however many chunks there are.  A chunk is finished only
after that.  So where tokens are split over ranks, and there is more than one chunk, what is needed before the
sum is made again after it: A in forward, A and dS in backward, three products more.  A sum for each chunk
would save them, and make the number of collectives depend on n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tokenformer.config.schema import ScoreNorm
from megatron_tokenformer.config.sizes import CHUNK_SCORES, chunk_rows
from megatron_tokenformer.kernels import score_norm
from megatron_tokenformer.parallel.collectives import TensorParallel, max_over_ranks, sum_over_ranks


@dataclass(frozen=True)
class Settings:
    """What pattend is told beside its tensors."""

    taus: tuple[float, ...]
    kind: ScoreNorm
    ranks: TensorParallel
    recompute_scores: bool
    chunk_scores: int

    def chunks(self, rows: int, keys: Sequence[Tensor]) -> list[slice]:
        """Into which rows of X a pass is cut."""
        size = rows
        if self.recompute_scores:
            size = chunk_rows(max(len(k) for k in keys), self.chunk_scores)
        return [slice(first, first + size) for first in range(0, max(rows, 1), max(size, 1))]


def pattend(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    taus: Sequence[float],
    kind: ScoreNorm,
    ranks: TensorParallel = TensorParallel(),
    recompute_scores: bool = False,
    chunk_scores: int = CHUNK_SCORES,
) -> list[Tensor]:
    """This rank's part of the output of each of several Pattentions of one input.

    Args:
        x: X, [..., d_in], the same on all ranks.
        keys: K of each, [n_i / ranks, d_in].
        values: V of each, [n_i / ranks, d_out_i].
        taus: tau of each.
        kind: the score norm.
        ranks: over which the tokens are split.
        recompute_scores: keep no scores for backward.  Always on where nothing needs a gradient, unless
            tokens are split over ranks, where chunks cost products.
        chunk_scores: the most scores of one projection at a time, with `recompute_scores`.

    Returns:
        Y of each, [..., d_out_i]; the output is the sum over ranks.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # Its casts would not reach the backward pass.
        dtype = torch.get_autocast_dtype(device)
        x, keys, values = x.to(dtype), [k.to(dtype) for k in keys], [v.to(dtype) for v in values]
        with torch.autocast(device, enabled=False):
            return pattend(x, keys, values, taus, kind, ranks, recompute_scores, chunk_scores)
    if ranks.size == 1 and not (
        torch.is_grad_enabled() and any(t.requires_grad for t in (x, *keys, *values))
    ):
        recompute_scores = True
    settings = Settings(tuple(taus), kind, ranks, recompute_scores, chunk_scores)
    outputs = _Pattend.apply(x.reshape(-1, x.shape[-1]), settings, *keys, *values)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


class _Pattend(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Settings, *tokens: Tensor) -> tuple[Tensor, ...]:
        keys, values = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
        chunks = settings.chunks(len(x), keys)
        # All at once only if they are kept, or wait for the ranks' sum.
        hold = len(chunks) == 1 and (settings.ranks.size > 1 or not settings.recompute_scores)
        scores = [x @ k.t() for k in keys] if hold else None
        stats = _stats_over_ranks(x, keys, scores, chunks, settings) if settings.ranks.size > 1 else None
        outputs = tuple(x.new_empty(len(x), v.shape[1]) for v in values)

        def attend(i: int, rows: slice) -> Tensor:
            # A function, here as in backward, so that scores are freed before the next are made.
            a = scores[i] if scores else x[rows] @ keys[i].t()
            known = None if stats is None else stats[i, :, rows]
            weights, own = score_norm.weights(a, settings.taus[i], settings.kind, known)
            torch.mm(weights, values[i], out=outputs[i][rows])
            return own

        found = [attend(i, rows) for rows in chunks for i in range(len(keys))]
        if stats is None:
            stats = _join(found, len(keys))
        kept = () if settings.recompute_scores else tuple(scores or ())
        ctx.save_for_backward(x, stats, *tokens, *kept)
        ctx.settings = settings
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, stats, *rest = ctx.saved_tensors
        settings, several = ctx.settings, len(grads)
        keys, values, kept = rest[:several], rest[several : 2 * several], rest[2 * several :]
        chunks = settings.chunks(len(x), keys)

        def scores_and_grad(i: int, rows: slice) -> tuple[Tensor, Tensor]:
            return kept[i] if kept else x[rows] @ keys[i].t(), grads[i][rows] @ values[i].t()

        held: list[tuple[Tensor, Tensor]] = []  # from before the ranks' sum to after it, if one chunk is all

        def row_sums(i: int, rows: slice) -> Tensor:
            a, g = scores_and_grad(i, rows)
            if len(chunks) == 1:
                held.append((a, g))
            return score_norm.row_sums(a, g, settings.taus[i], settings.kind, stats[i, :, rows])

        sums = None
        if settings.ranks.size > 1:
            parts = [row_sums(i, rows) for rows in chunks for i in range(several)]
            sums = sum_over_ranks(_join(parts, several), settings.ranks)
        need_x, _, *needed = ctx.needs_input_grad
        dx = torch.empty_like(x) if need_x else None
        token_grads: list[Tensor | None] = [None] * len(needed)

        def add_gradients(i: int, rows: slice) -> None:
            a, g = held.pop(0) if held else scores_and_grad(i, rows)
            row_sum = None if sums is None else sums[i, rows]
            weights = score_norm.gradients_(a, g, settings.taus[i], settings.kind, stats[i, :, rows], row_sum)
            for j, left, right in ((i, g, x), (several + i, weights, grads[i])):
                if needed[j]:
                    token_grads[j] = _plus_product(token_grads[j], left, right[rows], len(chunks) > 1)
            if dx is not None:
                torch.addmm(dx[rows], g, keys[i], beta=min(i, 1), out=dx[rows])

        for rows in chunks:
            for i in range(several):
                add_gradients(i, rows)
        return dx, None, *(None if grad is None else grad.to(x.dtype) for grad in token_grads)


def _stats_over_ranks(
    x: Tensor, keys: Sequence[Tensor], scores: list[Tensor] | None, chunks: list[slice], settings: Settings
) -> Tensor:
    """The rows' stats over all ranks' tokens, [projections, 1 or 2, rows]."""
    local = _join(
        [
            score_norm.row_stats(scores[i] if scores else x[rows] @ k.t(), settings.kind)
            for rows in chunks
            for i, k in enumerate(keys)
        ],
        len(keys),
    )
    if settings.kind != "softmax":
        return sum_over_ranks(local, settings.ranks)
    total, maximum = local.unbind(1)
    highest = max_over_ranks(maximum, settings.ranks)
    total = sum_over_ranks(total * torch.exp(maximum - highest), settings.ranks)
    return torch.stack([total, highest], dim=1)


def _join(parts: list[Tensor], projections: int) -> Tensor:
    """[..., rows of a chunk] of each projection of each chunk to [projections, ..., rows]."""
    return torch.stack([torch.cat(parts[i::projections], dim=-1) for i in range(projections)])


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, more: bool) -> Tensor:
    """`total` + left^T right; where there is more than one product, they are summed in fp32 or wider."""
    if total is None:
        product = left.t() @ right
        return product.to(torch.promote_types(product.dtype, torch.float32)) if more else product
    if total.dtype == left.dtype:
        return total.addmm_(left.t(), right)
    return total.add_(left.t() @ right)
