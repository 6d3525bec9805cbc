"""The score norms: against a reference written here, by gradcheck, and at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_tokenformer.kernels import score_norm


def reference(a: Tensor, tau: float, kind: str) -> Tensor:
    """The table of the paper, without any care for rows of zeros."""
    gelu = lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))  # noqa: E731
    if kind == "l2_norm_gelu":
        return gelu(tau * a / a.norm(dim=-1, keepdim=True))
    if kind == "gelu_l2_norm":
        return tau * gelu(a) / gelu(a).norm(dim=-1, keepdim=True)
    return tau**2 * torch.softmax(a, dim=-1)


def weights(a: Tensor, tau: float, kind: str) -> Tensor:
    """The two halves, one after the other."""
    numerator = score_norm.numerators(a, kind, a.amax(dim=-1, keepdim=True).detach())
    return score_norm.weights(numerator, score_norm.row_totals(numerator, kind), tau, kind)


@pytest.mark.parametrize("kind", score_norm.KINDS)
def test_equals_the_reference(kind: str) -> None:
    a = torch.randn(7, 3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    torch.testing.assert_close(weights(a, 6.5, kind), reference(a, 6.5, kind), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", score_norm.KINDS)
def test_gradient_is_the_derivative(kind: str) -> None:
    a = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: weights(a, 2.5, kind), a)


@pytest.mark.parametrize("kind", ["l2_norm_gelu", "gelu_l2_norm"])
def test_a_row_of_zeros_gives_zeros_and_finite_gradients(kind: str) -> None:
    a = torch.zeros(2, 5)
    a[0] = torch.arange(5.0)
    a.requires_grad_()
    s = weights(a, 2.0, kind)
    s.sum().backward()
    assert s[1].eq(0).all()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad[1].eq(0).all()


@pytest.mark.parametrize("kind", score_norm.KINDS)
def test_bf16_scores_are_summed_in_fp32(kind: str) -> None:
    # 4,096 equal scores: a bf16 sum would stop growing at 256 of them.
    a = torch.full((1, 4096), 0.5, dtype=torch.bfloat16)
    numerator = score_norm.numerators(a, kind, a.amax(dim=-1, keepdim=True))
    totals = score_norm.row_totals(numerator, kind)
    per_token = numerator[0, 0].float() ** (1 if kind == "softmax" else 2)
    assert totals.dtype == torch.float32
    assert totals.item() == pytest.approx(4096 * per_token.item(), rel=1e-6)
    assert score_norm.weights(numerator, totals, 64.0, kind).dtype == torch.bfloat16


def test_softmax_of_large_scores_is_finite() -> None:
    a = torch.tensor([[1e4, 1e4 - 1.0, -1e4]])
    assert weights(a, 1.0, "softmax").isfinite().all()
