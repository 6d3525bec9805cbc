"""The score norms: every implementation against a reference written here, by gradcheck, and at the edges.

Triton's kernels run on a GPU where there is one, and else under Triton's interpreter (tests/conftest.py).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megatron_tokenformer.config.schema import ScoreNorm
from megatron_tokenformer.kernels import eager, reference, score_norm, triton_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLEMENTATIONS = [eager, triton_kernels]
TAU = 6.5

every_kind = pytest.mark.parametrize("kind", get_args(ScoreNorm))
every_implementation = pytest.mark.parametrize(
    "implementation", IMPLEMENTATIONS, ids=lambda module: module.__name__.rsplit(".", 1)[-1]
)


def formula(a: Tensor, tau: float, kind: str) -> Tensor:
    """The table of the paper, without any care for rows of zeros."""
    gelu = lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))  # noqa: E731
    if kind == "l2_norm_gelu":
        return gelu(tau * a / a.norm(dim=-1, keepdim=True))
    if kind == "gelu_l2_norm":
        return tau * gelu(a) / gelu(a).norm(dim=-1, keepdim=True)
    return tau**2 * torch.softmax(a, dim=-1)


def example(rows: int, n: int, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores and the gradient of their weights, fp64."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, n, dtype=torch.float64, generator=generator) * scale
    return a.to(DEVICE), torch.randn(rows, n, dtype=torch.float64, generator=generator).to(DEVICE)


def expected(a: Tensor, g: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """S and the gradient of A in fp64, by the formula and autograd."""
    a = a.double().clone().requires_grad_()
    s = formula(a, TAU, kind)
    s.backward(g.double())
    assert a.grad is not None
    return s.detach(), a.grad


def both_passes(implementation: ModuleType, a: Tensor, g: Tensor, kind: Any) -> tuple[Tensor, Tensor, Tensor]:
    """S of the forward pass, S of the backward pass, and the gradient of A."""
    s, stats = implementation.weights(a, TAU, kind)
    grad = g.clone()
    again = implementation.gradients_(a, grad, TAU, kind, stats)
    return s, again, grad


def assert_same(again: Tensor, found: Tensor) -> None:
    """To the last bit, but for a rounding or two where a GPU's compiler fused two passes in two ways."""
    if DEVICE.type == "cpu":
        assert torch.equal(again, found)
    else:
        unit = torch.finfo(found.dtype).eps
        torch.testing.assert_close(again, found, rtol=2 * unit, atol=4 * 2**-23 * float(found.abs().max()))


@every_kind
@pytest.mark.parametrize("n", [1, 40, 5000])
def test_the_reference_is_the_formula(kind: str, n: int) -> None:
    a, _ = example(7, n)
    found = reference.normalised_scores(a.view(7, 1, n), TAU, kind)
    torch.testing.assert_close(found[:, 0], formula(a, TAU, kind), rtol=1e-12, atol=1e-12)


@every_implementation
@every_kind
@pytest.mark.parametrize("rows, n", [(7, 40), (1, 64), (3, 1), (2, 5000), (5, 2049)])
def test_fp32_is_the_formula_and_its_gradient(
    implementation: ModuleType, kind: str, rows: int, n: int
) -> None:
    a, g = example(rows, n, scale=1.0 if n == 1 else 3.0)  # alone, a gelu(-6) is 0 in fp32, and not in fp64
    s, grad = expected(a, g, kind)
    found, again, found_grad = both_passes(implementation, a.float(), g.float(), kind)
    assert found.dtype == found_grad.dtype == torch.float32
    torch.testing.assert_close(found.double(), s, rtol=1e-5, atol=1e-5 * s.abs().max().item())
    assert_same(again, found)
    slope = TAU / reference.row_totals(reference.numerators(a, kind, a.amax(-1, keepdim=True)), kind).sqrt()
    terms = TAU * g.abs().max() if kind == "softmax" else g.abs().max() * slope.max()  # that may cancel
    torch.testing.assert_close(found_grad.double(), grad, rtol=1e-5, atol=1e-6 * terms.item())


@every_implementation
@every_kind
@pytest.mark.parametrize("dtype, unit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_16_bits_are_rounded_once(
    implementation: ModuleType, kind: str, dtype: torch.dtype, unit: float
) -> None:
    a, g = (x.to(dtype) for x in example(6, 600))
    s, grad = expected(a, g, kind)
    found, again, found_grad = both_passes(implementation, a, g, kind)
    assert found.dtype == found_grad.dtype == dtype
    assert_same(again, found)
    if dtype == torch.bfloat16 and implementation is triton_kernels and DEVICE.type == "cpu":
        unit *= 2  # the interpreter truncates where a GPU rounds
    for here, exact in ((found, s), (found_grad, grad)):
        tolerance = unit * exact.abs() + 1e-5 * exact.abs().max() + 2**-24  # fp16 ends at 2^-24
        assert ((here.double() - exact).abs() <= tolerance).all()


@every_implementation
@every_kind
@pytest.mark.parametrize("parts", [2, 3])
def test_a_row_in_parts_is_the_whole_row(implementation: ModuleType, kind: str, parts: int) -> None:
    a, g = (x.float() for x in example(5, 96))
    s, grad = expected(a, g, kind)
    pieces = list(zip(a.chunk(parts, dim=1), g.chunk(parts, dim=1)))  # rows that are not next to each other
    stats = torch.stack([implementation.row_stats(p, kind) for p, _ in pieces])
    if kind == "softmax":
        highest = stats[:, 1].amax(dim=0)
        total = (stats[:, 0] * (stats[:, 1] - highest).exp()).sum(dim=0)
        whole = torch.stack([total, highest])
    else:
        whole = stats.sum(dim=0)
    weights = [implementation.weights(p, TAU, kind, whole)[0] for p, _ in pieces]
    torch.testing.assert_close(torch.cat(weights, 1).double(), s, rtol=1e-5, atol=1e-6 * s.abs().max().item())
    sums = sum(implementation.row_sums(p, q, TAU, kind, whole) for p, q in pieces)
    for (p, q), part in zip(pieces, weights):
        assert_same(implementation.gradients_(p, q, TAU, kind, whole, sums), part)
    torch.testing.assert_close(g.double(), grad, rtol=1e-5, atol=1e-5)  # `g` was overwritten through `pieces`


class Normalise(torch.autograd.Function):
    """An implementation's two passes as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, kind: Any) -> Tensor:
        s, stats = eager.weights(a, 2.5, kind)
        ctx.kind = kind
        ctx.save_for_backward(a, stats)
        return s

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        a, stats = ctx.saved_tensors
        grad = g.clone()
        eager.gradients_(a, grad, 2.5, ctx.kind, stats)
        return grad, None


@every_kind
@pytest.mark.parametrize("n", [1, 8])
def test_gradient_is_the_derivative(kind: str, n: int) -> None:
    a, _ = example(3, n, scale=1.0, seed=1)
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: reference.normalised_scores(a, 2.5, kind), a)
    assert torch.autograd.gradcheck(lambda a: Normalise.apply(a, kind), a)


@every_implementation
@pytest.mark.parametrize("kind", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_zeros_gives_zeros(implementation: ModuleType, kind: str, dtype: torch.dtype) -> None:
    a = torch.zeros(2, 5, dtype=dtype, device=DEVICE)
    a[0] = torch.arange(5.0)
    s, again, grad = both_passes(implementation, a, torch.ones_like(a), kind)
    assert s[1].eq(0).all() and again[1].eq(0).all() and grad[1].eq(0).all()
    assert s.isfinite().all() and grad.isfinite().all() and s[0].any()


@every_implementation
@every_kind
@pytest.mark.parametrize("scale", [1e4, 1e15, -1e4])
def test_huge_scores_are_finite_and_right(implementation: ModuleType, kind: str, scale: float) -> None:
    a = (torch.tensor([[1.0, 0.9999, -1.0, 0.5, 0.25]]) * scale).to(DEVICE)
    g = torch.linspace(-1, 1, 5, device=DEVICE).unsqueeze(0)
    s, grad = expected(a, g, kind)
    found, _, found_grad = both_passes(implementation, a, g, kind)
    torch.testing.assert_close(found.double(), s, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_grad.double(), grad, rtol=1e-4, atol=1e-5)


@every_implementation
@every_kind
def test_bf16_scores_are_summed_in_fp32(implementation: ModuleType, kind: str) -> None:
    # 4,096 equal scores: a bf16 sum would stop growing at 256 of them.
    a = torch.full((1, 4096), 0.5, dtype=torch.bfloat16, device=DEVICE)
    stats = implementation.row_stats(a, kind)
    half = torch.tensor(0.5)
    per_token = {"l2_norm_gelu": half**2, "gelu_l2_norm": torch.nn.functional.gelu(half) ** 2}
    assert stats.dtype == torch.float32
    assert stats[0].item() == pytest.approx(4096 * per_token.get(kind, torch.tensor(1.0)).item(), rel=1e-6)


@every_implementation
@every_kind
def test_no_rows_are_no_error(implementation: ModuleType, kind: str) -> None:
    a = torch.empty(0, 8, device=DEVICE)
    s, _, grad = both_passes(implementation, a, a, kind)
    assert s.shape == grad.shape == (0, 8)


def test_the_kernels_refuse_what_they_would_read_wrongly() -> None:
    a = torch.ones(8, 4, device=DEVICE).t()
    with pytest.raises(ValueError, match="not in rows"):
        triton_kernels.weights(a, TAU, "l2_norm_gelu")


def test_dispatch_goes_by_device_and_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        scores = torch.empty(1, 1, device=DEVICE, dtype=dtype)
        kernels = DEVICE.type == "cuda" and dtype != torch.float64
        assert score_norm.implementation(scores) is (triton_kernels if kernels else eager)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="rows beyond 2^31 elements take a GPU")
@every_kind
def test_rows_beyond_2_to_the_31_elements(kind: str) -> None:
    n, needed = 36864, 30 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"less than {needed / 2**30:.0f} GiB of the GPU are free")
    rows = 2**31 // n + 5
    a = torch.zeros(rows, n, dtype=torch.bfloat16, device=DEVICE)
    g = torch.zeros_like(a)
    last, last_g = (x.bfloat16() for x in example(4, n))
    a[-4:], g[-4:] = last, last_g
    found, again, grad = both_passes(triton_kernels, a, g, kind)
    s, exact = expected(last, last_g, kind)
    for here, there in ((found, s), (again, s), (grad, exact)):
        assert ((here[-4:].double() - there).abs() <= 2**-8 * there.abs() + 1e-5 * there.abs().max()).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
@every_kind
def test_a_gpu_that_is_not_the_current_one(kind: str) -> None:
    a, g = (x.float().to("cuda:1") for x in example(5, 600))
    s, exact = expected(a, g, kind)
    with torch.cuda.device(0):
        found, _, grad = both_passes(triton_kernels, a, g, kind)
    torch.testing.assert_close(found.double(), s, rtol=1e-5, atol=1e-5 * s.abs().max().item())
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


def test_launches_are_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: asked.append(tensor) or device_of(tensor))
    a, g = (x.float() for x in example(2, 8))
    _, stats = triton_kernels.weights(a, TAU, "softmax")
    triton_kernels.gradients_(a, g, TAU, "softmax", stats)
    assert len(asked) == 2 and all(tensor is a for tensor in asked)
