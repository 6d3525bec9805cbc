"""Differentiable collectives over the tensor-parallel ranks, each beside its conjugate.

| forward                  | backward                 | function            |
|--------------------------|--------------------------|---------------------|
| identity                 | all-reduce               | `copy_to_ranks`     |
| all-reduce               | identity                 | `sum_from_ranks`    |
| all-reduce               | all-reduce               | `sum_over_ranks`    |
| all-gather along dim     | reduce-scatter along dim | `gather_from_ranks` |
| reduce-scatter along dim | all-gather along dim     | `scatter_sum`       |

Which all-reduce a sum needs depends on who reads it.  After `sum_from_ranks` every rank computes the same
thing, so the gradient that arrives is whole already.  After `sum_over_ranks` each rank goes on with its own
parameter tokens, so the gradients that arrive are parts and are summed too.

megatron-core's mappings are not used: off the GPU all but two of them fail, and its reduction returns a
non-contiguous input unreduced (0.16.1).  With one rank every function here returns its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel ranks, seen from one of them.  The default is a model that is not split."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence: bool = False
    """whether activations between Pattentions are split along the sequence (dimension 0) as well"""

    def rows(self, total: int) -> range:
        """The rows of a parameter with `total` rows that this rank holds."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)


def copy_to_ranks(x: Tensor, ranks: TensorParallel) -> Tensor:
    """Hand the same tensor to every rank's own computation; the gradients of those are summed."""
    return x if ranks.size == 1 else _Copy.apply(x, ranks)


def sum_from_ranks(x: Tensor, ranks: TensorParallel) -> Tensor:
    """Sum partial results; all ranks then compute the same thing with the sum."""
    return x if ranks.size == 1 else _Sum.apply(x, ranks, False)


def sum_over_ranks(x: Tensor, ranks: TensorParallel) -> Tensor:
    """Sum partial results; each rank then computes something of its own with the sum."""
    return x if ranks.size == 1 else _Sum.apply(x, ranks, True)


def gather_from_ranks(x: Tensor, ranks: TensorParallel, dim: int) -> Tensor:
    """Join the ranks' slices along `dim`; the gradients of the whole are summed, each rank gets its slice."""
    return x if ranks.size == 1 else _Gather.apply(x, ranks, dim)


def scatter_sum(x: Tensor, ranks: TensorParallel, dim: int) -> Tensor:
    """Sum partial results and keep this rank's slice of the sum along `dim`."""
    return x if ranks.size == 1 else _ScatterSum.apply(x, ranks, dim)


def max_over_ranks(x: Tensor, ranks: TensorParallel) -> Tensor:
    """The largest of the ranks' values; not differentiable."""
    x = x.detach().clone()
    if ranks.size > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=ranks.group)
    return x


def _all_reduce(x: Tensor, ranks: TensorParallel) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=ranks.group)
    return total


def _all_gather(x: Tensor, ranks: TensorParallel, dim: int) -> Tensor:
    mine = x.movedim(dim, 0).contiguous()
    whole = mine.new_empty(ranks.size * mine.shape[0], *mine.shape[1:])
    dist.all_gather_into_tensor(whole, mine, group=ranks.group)
    return whole.movedim(0, dim).contiguous()


def _reduce_scatter(x: Tensor, ranks: TensorParallel, dim: int) -> Tensor:
    parts = x.movedim(dim, 0).contiguous()
    mine = parts.new_empty(parts.shape[0] // ranks.size, *parts.shape[1:])
    dist.reduce_scatter_tensor(mine, parts, group=ranks.group)
    return mine.movedim(0, dim).contiguous()


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorParallel) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.ranks), None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorParallel, sum_gradients: bool) -> Tensor:
        ctx.ranks, ctx.sum_gradients = ranks, sum_gradients
        return _all_reduce(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_reduce(grad, ctx.ranks) if ctx.sum_gradients else grad, None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorParallel, dim: int) -> Tensor:
        ctx.ranks, ctx.dim = ranks, dim
        return _all_gather(x, ranks, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, ctx.ranks, ctx.dim), None, None


class _ScatterSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorParallel, dim: int) -> Tensor:
        ctx.ranks, ctx.dim = ranks, dim
        return _reduce_scatter(x, ranks, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, ctx.ranks, ctx.dim), None, None
