"""Each collective against what it stands for, and its backward against its conjugate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_tokenformer.parallel import collectives
from megatron_tokenformer.parallel.layout import Layout
from tests.ranks import run_ranks

SIZE = 3
SHAPE = (6, 4, 12)


def own(rank: int, seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * seed + rank))


def forward_and_backward(
    layout: Layout, name: str, dim: int | None, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Apply a collective to this rank's tensor, and send a gradient of this rank's own back."""
    rank = layout.tensor.rank
    x = own(rank, 1, SHAPE)
    if transposed:  # not contiguous, and must not be changed in place
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    x.requires_grad_()
    before = x.detach().clone()
    function: Callable[..., Tensor] = getattr(collectives, name)
    y = function(x, layout.tensor) if dim is None else function(x, layout.tensor, dim)
    y.backward(own(rank, 2, tuple(y.shape)))
    assert torch.equal(x, before)
    assert x.grad is not None
    return y.detach(), x.grad


def slices(x: Tensor, dim: int) -> list[Tensor]:
    return list(x.chunk(SIZE, dim))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "name, dim",
    [
        ("copy_to_ranks", None),
        ("sum_from_ranks", None),
        ("sum_over_ranks", None),
        ("gather_from_ranks", 0),
        ("gather_from_ranks", -1),
        ("scatter_sum", 0),
        ("scatter_sum", -1),
    ],
)
def test_forward_and_backward(name: str, dim: int | None, transposed: bool) -> None:
    results = run_ranks(SIZE, forward_and_backward, name, dim, transposed, tensor=SIZE)
    inputs = [own(rank, 1, SHAPE) for rank in range(SIZE)]
    gradients = [own(rank, 2, tuple(results[rank][0].shape)) for rank in range(SIZE)]
    total, gradient_total = sum(inputs), sum(gradients)
    outputs, backward = {
        "copy_to_ranks": lambda: (inputs, [gradient_total] * SIZE),
        "sum_from_ranks": lambda: ([total] * SIZE, gradients),
        "sum_over_ranks": lambda: ([total] * SIZE, [gradient_total] * SIZE),
        "gather_from_ranks": lambda: ([torch.cat(inputs, dim)] * SIZE, slices(gradient_total, dim)),
        "scatter_sum": lambda: (slices(total, dim), [torch.cat(gradients, dim)] * SIZE),
    }[name]()
    for (y, dx), expected_y, expected_dx in zip(results, outputs, backward):
        torch.testing.assert_close(y, expected_y)
        torch.testing.assert_close(dx, expected_dx)


def test_one_rank_is_untouched() -> None:
    x, ranks = torch.randn(4, 4), collectives.TensorParallel()
    assert collectives.copy_to_ranks(x, ranks) is x
    assert collectives.sum_from_ranks(x, ranks) is x
    assert collectives.sum_over_ranks(x, ranks) is x
    assert collectives.gather_from_ranks(x, ranks, 0) is x
    assert collectives.scatter_sum(x, ranks, 0) is x
