"""Pattention written out: against the formula and autograd, in chunks, over ranks; what is kept and sent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tokenformer.config.schema import ScoreNorm
from megatron_tokenformer.model.pattend import pattend
from megatron_tokenformer.parallel.layout import Layout
from tests.model.test_pattention import reference
from tests.ranks import run_ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""of the tests of one process; ranks are on the CPU"""
ROWS, D_IN, D_OUT = (2, 150), 12, (10, 6)
TOKENS = (24, 40)
TAUS = (4.5, 6.0)
CHUNKED = {"recompute_scores": True, "chunk_scores": 1}  # 128 rows, the least: 128, 128 and 44 of 300
POLICIES: list[dict[str, Any]] = [{}, {"recompute_scores": True}, CHUNKED]

every_kind = pytest.mark.parametrize("kind", get_args(ScoreNorm))
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=["kept", "recomputed", "chunked"])


def example(
    dtype: torch.dtype = torch.float64, device: torch.device = DEVICE
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """X, keys, values, and the gradients of the outputs of two Pattentions."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(0.5).to(device, dtype)

    x = draw(*ROWS, D_IN).requires_grad_()
    keys = [draw(n, D_IN).requires_grad_() for n in TOKENS]
    values = [draw(n, d).requires_grad_() for n, d in zip(TOKENS, D_OUT)]
    return x, keys, values, [draw(*ROWS, d) for d in D_OUT]


def expected(dtype: torch.dtype, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of X, keys and values, in fp64, of numbers rounded to `dtype`."""
    x, keys, values, grads = example(dtype)
    leaves = [t.detach().double().requires_grad_() for t in (x, *keys, *values)]
    outputs = [reference(leaves[0], leaves[1 + i], leaves[3 + i], tau, kind) for i, tau in enumerate(TAUS)]
    torch.autograd.backward(outputs, [g.double() for g in grads])
    return [y.detach() for y in outputs], [leaf.grad for leaf in leaves]


def found(dtype: torch.dtype, kind: str, policy: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The same by `pattend`."""
    x, keys, values, grads = example(dtype)
    outputs = pattend(x, keys, values, TAUS, kind, **policy)
    torch.autograd.backward(outputs, grads)
    return [y.detach() for y in outputs], [t.grad for t in (x, *keys, *values)]


@every_kind
@every_policy
def test_equals_the_formula_forward_and_backward(kind: str, policy: dict[str, Any]) -> None:
    for here, there in zip(found(torch.float64, kind, policy), expected(torch.float64, kind)):
        torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-10)


@every_kind
@pytest.mark.parametrize("policy", [{}, {"recompute_scores": True}], ids=["kept", "recomputed"])
def test_gradcheck_in_float64(kind: str, policy: dict[str, Any]) -> None:
    x, *tokens, _ = example()
    x = x.detach()[0, :2, :4].requires_grad_()
    keys, values = ([t.detach()[:5, :4].requires_grad_() for t in kind_of] for kind_of in tokens)
    assert torch.autograd.gradcheck(
        lambda x, *tokens: tuple(pattend(x, tokens[:2], tokens[2:], TAUS, kind, **policy)),
        (x, *keys, *values),
    )


@every_kind
@every_policy
def test_bf16_is_as_close_as_its_rounding(kind: str, policy: dict[str, Any]) -> None:
    for here, there in zip(found(torch.bfloat16, kind, policy), expected(torch.bfloat16, kind)):
        for mine, exact in zip(here, there):
            assert mine.dtype == torch.bfloat16
            assert (
                mine.double() - exact
            ).norm() < 8e-3 * exact.norm()  # a rounding or two of 2^-9 on average


def test_gradients_of_many_chunks_are_summed_in_fp32() -> None:
    # Each of 512 chunks adds 1 to the gradient of the one value: a bf16 sum would stay at 256.
    x = torch.ones(512 * 128, 1, dtype=torch.bfloat16, device=DEVICE)
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=DEVICE)
    keys, values = (one.clone().requires_grad_() for _ in range(2))
    (y,) = pattend(x, [keys], [values], [1.0], "softmax", recompute_scores=True, chunk_scores=1)
    y.backward(torch.full_like(y, 1 / 128))
    assert values.grad is not None and values.grad.item() == 512.0


@every_policy
def test_rows_of_zeros_and_no_rows(policy: dict[str, Any]) -> None:
    _, keys, values, _ = example(torch.float32)
    for rows in (0, 5):
        x = torch.zeros(rows, D_IN, device=DEVICE, requires_grad=True)
        outputs = pattend(x, keys, values, TAUS, "l2_norm_gelu", **policy)
        sum(y.sum() for y in outputs).backward()
        assert all(y.eq(0).all() and y.shape[0] == rows for y in outputs)
        assert x.grad is not None and x.grad.eq(0).all()
    assert all(t.grad is not None and t.grad.eq(0).all() for t in (*keys, *values))


@every_policy
def test_frozen_tokens_get_no_gradient(policy: dict[str, Any]) -> None:
    x, keys, values, grads = example()
    _, whole = expected(torch.float64, "l2_norm_gelu")
    keys[0].requires_grad_(False)
    values[1].requires_grad_(False)
    torch.autograd.backward(pattend(x, keys, values, TAUS, "l2_norm_gelu", **policy), grads)
    for tensor, exact in zip((x, *keys, *values), whole):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, exact, rtol=1e-10, atol=1e-10)
        else:
            assert tensor.grad is None


def test_autocast_reaches_the_backward_pass() -> None:
    x, keys, values, grads = example(torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = pattend(x, keys, values, TAUS, "l2_norm_gelu")
    torch.autograd.backward(outputs, [g.to(y.dtype) for g, y in zip(grads, outputs)])
    exact, exact_grads = expected(torch.float32, "l2_norm_gelu")
    for mine, there in zip([*outputs, *(t.grad for t in (x, *keys, *values))], [*exact, *exact_grads]):
        assert (mine.double() - there).norm() < 2e-2 * there.norm()
    assert outputs[0].dtype == torch.bfloat16 and keys[0].grad.dtype == torch.float32


def kept_elements(kind: str, policy: dict[str, Any]) -> int:
    """Elements of what is kept for backward beside X, K and V."""
    x, keys, values, _ = example()
    known = {t.untyped_storage().data_ptr() for t in (x, *keys, *values)}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = pattend(x, keys, values, TAUS, kind, **policy)
    assert outputs
    return sum(kept.values())


@every_kind
def test_keeps_the_scores_once_or_not_at_all(kind: str) -> None:
    rows = x_rows()
    stats = rows * len(TOKENS) * (2 if kind == "softmax" else 1)
    assert kept_elements(kind, {}) == stats + rows * sum(TOKENS)
    assert kept_elements(kind, {"recompute_scores": True}) == stats
    assert kept_elements(kind, CHUNKED) == stats


def most_elements(policy: dict[str, Any], frozen: bool) -> int:
    """The most elements at once, in a forward pass that needs no gradient, of what is as wide as scores.

    Keys count too, once they are transposed.
    """
    x, keys, values, _ = example()
    tokens = {len(k) for k in keys}
    alive: dict[int, tuple[StorageWeakRef, int]] = {}
    most = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.ndim == 2 and result.shape[1] in tokens:
                storage = result.untyped_storage()
                alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() // 8)
            now = {key: one for key, one in alive.items() if not one[0].expired()}
            most = max(most, sum(size for _, size in now.values()))
            return result

    if frozen:
        x, keys, values = (x.detach(), [k.detach() for k in keys], [v.detach() for v in values])
    with contextlib.nullcontext() if frozen else torch.no_grad(), Count():
        pattend(x, keys, values, TAUS, "l2_norm_gelu", **policy)
    return most


@pytest.mark.parametrize("frozen", [False, True], ids=["no_grad", "frozen"])
def test_without_gradients_one_chunk_of_one_projection_is_held_at_a_time(frozen: bool) -> None:
    keys, at_once = D_IN * sum(TOKENS), 3 * max(TOKENS)  # scores, weights, and the squares of a CPU's sum
    assert at_once < sum(TOKENS) + 2 * max(TOKENS), "which is what all scores at once would take"
    for policy in ({}, {"recompute_scores": True}):
        assert most_elements(policy, frozen) <= keys + at_once * x_rows()
    assert most_elements({"chunk_scores": 1}, frozen) <= keys + at_once * 128


@every_kind
def test_without_gradients_the_outputs_are_the_same(kind: str) -> None:
    exact, _ = expected(torch.float64, kind)
    x, keys, values, _ = example()
    with torch.no_grad():
        for here, there in zip(pattend(x, keys, values, TAUS, kind, chunk_scores=1), exact):
            torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-10)


def x_rows() -> int:
    """Rows of the example's X."""
    return ROWS[0] * ROWS[1]


def split_pass(
    layout: Layout, kind: str, policy: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], list[tuple[str, tuple[int, ...]]]]:
    """This rank's outputs and gradients, and the collectives it took part in: their names and shapes."""
    x, keys, values, grads = example(device=layout.device)
    ranks = layout.tensor
    mine = [
        t.detach()[ranks.rows(len(t)).start : ranks.rows(len(t)).stop].requires_grad_()
        for t in (*keys, *values)
    ]
    calls: list[tuple[str, tuple[int, ...]]] = []
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, counted(name, getattr(dist, name), calls))
    outputs = pattend(x, mine[:2], mine[2:], TAUS, kind, ranks, **policy)
    torch.autograd.backward(outputs, grads)
    return [y.detach() for y in outputs], [t.grad for t in (x, *mine)], calls


def counted(
    name: str, call: Callable[..., Any], calls: list[tuple[str, tuple[int, ...]]]
) -> Callable[..., Any]:
    """`call`, noting its name and the shape of its first tensor."""

    def wrapped(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        calls.append((name, tuple(tensor.shape)))
        return call(tensor, *arguments, **keywords)

    return wrapped


@every_kind
@every_policy
def test_split_over_ranks_equals_whole_with_the_same_few_collectives(
    kind: str, policy: dict[str, Any]
) -> None:
    exact, exact_grads = ([t.cpu() for t in found] for found in expected(torch.float64, kind))
    parts = run_ranks(2, split_pass, kind, policy, tensor=2)
    for i, y in enumerate(exact):
        torch.testing.assert_close(sum(p[0][i] for p in parts), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(p[1][0] for p in parts), exact_grads[0], rtol=1e-10, atol=1e-10)
    for i, grad in enumerate(exact_grads[1:], start=1):
        torch.testing.assert_close(torch.cat([p[1][i] for p in parts]), grad, rtol=1e-10, atol=1e-10)
    for _, _, calls in parts:
        assert {name for name, _ in calls} == {"all_reduce"}
        assert len(calls) == (3 if kind == "softmax" else 2)  # maximum, total; row sum
        assert {torch.Size(shape).numel() for _, shape in calls} == {len(TOKENS) * x_rows()}
