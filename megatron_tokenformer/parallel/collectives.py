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

import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_tokenformer.config.traffic import ACTIVATIONS, ROW_TOTALS


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
    return x if ranks.size == 1 else _apply(_Copy, x, ranks)


def sum_from_ranks(x: Tensor, ranks: TensorParallel) -> Tensor:
    """Sum partial results; all ranks then compute the same thing with the sum."""
    return x if ranks.size == 1 else _apply(_Sum, x, ranks, False)


def sum_over_ranks(x: Tensor, ranks: TensorParallel) -> Tensor:
    """Sum partial results; each rank then computes something of its own with the sum."""
    return x if ranks.size == 1 else _apply(_Sum, x, ranks, True)


def gather_from_ranks(x: Tensor, ranks: TensorParallel, dim: int) -> Tensor:
    """Join the ranks' slices along `dim`; the gradients of the whole are summed, each rank gets its slice."""
    return x if ranks.size == 1 else _apply(_Gather, x, ranks, dim)


def scatter_sum(x: Tensor, ranks: TensorParallel, dim: int) -> Tensor:
    """Sum partial results and keep this rank's slice of the sum along `dim`."""
    return x if ranks.size == 1 else _apply(_ScatterSum, x, ranks, dim)


@torch.compiler.disable
def _apply(function: type[Function], *arguments: Any) -> Tensor:
    """Opaque to torch.compile, which would put its functional collectives in the place of c10d's."""
    result: Tensor = function.apply(*arguments)
    return result


def max_over_ranks(x: Tensor, ranks: TensorParallel) -> Tensor:
    """The largest of the ranks' values; not differentiable."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    if ranks.size > 1:
        with _Purpose(ROW_TOTALS):
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=ranks.group)
    return x


_call = threading.local()


def purpose_of_this_call() -> str | None:
    """What the collective that this thread is calling is for, if it is one of ours; for `traffic.py`."""
    return getattr(_call, "purpose", None)


class _Purpose:
    """Say what the collective inside is for.  Not `contextlib`'s, which takes three times as long."""

    def __init__(self, purpose: str) -> None:
        self.purpose = purpose

    def __enter__(self) -> None:
        _call.purpose = self.purpose

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _call.purpose = None


def _all_reduce(x: Tensor, ranks: TensorParallel, purpose: str = ACTIVATIONS) -> Tensor:
    # A copy, as c10d reduces in place: a gradient may be shared with the residual branch beside.
    total = x.clone(memory_format=torch.contiguous_format)
    with _Purpose(purpose):
        dist.all_reduce(total, group=ranks.group)
    return total


# The ranks' slices lie one after another in what c10d gathers and scatters, so along any other dimension than
# the first they are moved there as blocks: one copy, of rows that stay together, where there must be one.


def _all_gather(x: Tensor, ranks: TensorParallel, dim: int) -> Tensor:
    dim %= x.dim()
    slices = x.new_empty(ranks.size, *x.shape)
    with _Purpose(ACTIVATIONS):
        dist.all_gather_into_tensor(slices.flatten(0, 1), x.contiguous(), group=ranks.group)
    return slices.movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(x: Tensor, ranks: TensorParallel, dim: int) -> Tensor:
    dim %= x.dim()
    slices = x.unflatten(dim, (ranks.size, -1)).movedim(dim, 0).contiguous()
    mine = torch.empty_like(slices[0])
    with _Purpose(ACTIVATIONS):
        dist.reduce_scatter_tensor(mine, slices.flatten(0, 1), group=ranks.group)
    return mine


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
        return _all_reduce(x, ranks, ROW_TOTALS if sum_gradients else ACTIVATIONS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_reduce(grad, ctx.ranks, ROW_TOTALS) if ctx.sum_gradients else grad, None, None


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
