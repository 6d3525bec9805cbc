"""The score norms as Triton kernels: one program for each row, which it reads in blocks.

Formulas, shapes and arguments are those of `score_norm.py`.  The forward and the backward pass are a kernel
each, with two halves, the sum over the row's tokens and what is written with it.  Where a row is whole, one
launch does both, and its second reading of the row is meant to come from the cache (`settings`); where it is
split over ranks, each half is a launch of its own, with the ranks' sum between.

N and the rows' distances are fixed when a kernel is compiled: a model has two or three, and the compiler
drops masks where blocks fit, and reads 16 bytes at a time where rows begin at a multiple of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tokenformer.config.schema import ScoreNorm

WARP_SIZE = 64 if torch.version.hip else 32
THREAD_TOKENS = 8
"""that a thread reads at once: 16 bytes in bf16"""
THREAD_BYTES = 80
"""of a row for each thread that reads it, so that the rows in flight fit in the cache (`settings`)"""
FEWEST_THREADS = 128
MOST_THREADS = {32: 1024, 64: 512}
"""by WARP_SIZE: with 1,024 threads of a gfx942, registers of backward's `gelu_l2_norm` spill"""


def row_stats(scores: Tensor, kind: ScoreNorm) -> Tensor:
    """See `score_norm.row_stats`."""
    stats = _new_stats(scores, kind)
    _run_forward(scores, scores, stats, 1.0, kind, sums=True, writes=False)
    return stats


def weights(
    scores: Tensor, tau: float, kind: ScoreNorm, stats: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `score_norm.weights`."""
    found = _new_stats(scores, kind) if stats is None else stats.contiguous()
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    _run_forward(scores, out, found, tau, kind, sums=stats is None, writes=True)
    return out, found


def row_sums(scores: Tensor, grad: Tensor, tau: float, kind: ScoreNorm, stats: Tensor) -> Tensor:
    """See `score_norm.row_sums`."""
    sums = torch.empty_like(stats[0])
    _run_backward(scores, grad, scores, stats, sums, tau, kind, sums=True, writes=False)
    return sums


def gradients_(
    scores: Tensor, grad: Tensor, tau: float, kind: ScoreNorm, stats: Tensor, sums: Tensor | None = None
) -> Tensor:
    """See `score_norm.gradients_`."""
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    found = torch.empty_like(stats[0]) if sums is None else sums.contiguous()
    _run_backward(scores, grad, out, stats, found, tau, kind, sums=sums is None, writes=True)
    return out


def _new_stats(scores: Tensor, kind: ScoreNorm) -> Tensor:
    return scores.new_empty(2 if kind == "softmax" else 1, len(scores), dtype=torch.float32)


def _run_forward(
    scores: Tensor, out: Tensor, stats: Tensor, tau: float, kind: ScoreNorm, sums: bool, writes: bool
) -> None:
    rows, n = _shape(scores)
    if rows:
        with torch.cuda.device_of(scores):
            _forward_kernel[(rows,)](
                scores,
                out,
                stats,
                rows,
                tau,
                SCORES_STRIDE=scores.stride(0),
                OUT_STRIDE=out.stride(0),
                N=n,
                KIND=kind,
                SUMS=sums,
                WRITES=writes,
                **settings(n, scores.element_size()),
            )


def _run_backward(
    scores: Tensor,
    grad: Tensor,
    out: Tensor,
    stats: Tensor,
    totals: Tensor,
    tau: float,
    kind: ScoreNorm,
    sums: bool,
    writes: bool,
) -> None:
    rows, n = _shape(scores, grad)
    if rows:
        with torch.cuda.device_of(scores):
            _backward_kernel[(rows,)](
                scores,
                grad,
                out,
                stats.contiguous(),
                totals,
                rows,
                tau,
                SCORES_STRIDE=scores.stride(0),
                GRAD_STRIDE=grad.stride(0),
                OUT_STRIDE=out.stride(0),
                N=n,
                KIND=kind,
                SUMS=sums,
                WRITES=writes,
                **settings(n, scores.element_size()),
            )


def _shape(*tensors: Tensor) -> tuple[int, int]:
    """[rows, n] of all of them.

    Raises:
        ValueError: the tokens of a row are not next to each other, as the kernels read them.
    """
    rows, n = tensors[0].shape
    if n > 1 and any(tensor.stride(1) != 1 for tensor in tensors):
        raise ValueError(f"scores of strides {[tensor.stride() for tensor in tensors]} are not in rows")
    return rows, n


def settings(n: int, element_size: int) -> dict[str, Any]:
    """How many warps read a row of n tokens, and how many tokens at once: launch options of both kernels.

    A row is read twice, for its sum and for what is written, and the second reading should find it in the
    cache.  So all rows that are being read at one time must fit there.  In backward, the larger pass, a row
    of bf16 is A and G, 4 n bytes.  A thread takes about 48 registers, so a multiprocessor with 65,536 of them
    runs some 40 warps.  With 4 warps for a row of 36,864 tokens, an H100's 132 multiprocessors would be at
    132 x 10 rows, 195 MB; its L2 cache has 50 MB, in two halves.  With 32 warps they are at 132 rows, 19 MB.
    A thread for every 40 tokens of bf16 keeps it near 30 MB at most, up to 40,960 tokens.  Enough is under
    way all the same: 32 warps that read 512 bytes each of A and of G are 4.3 MB on the whole device, what a
    memory of 4.8 TB/s delivers in 0.9 microseconds, which is about its latency.

    This is arithmetic, with registers as the compiler reports them.  It was not measured on a GPU.
    """
    wanted = triton.next_power_of_2(triton.cdiv(n * element_size, THREAD_BYTES))
    threads = min(max(wanted, FEWEST_THREADS), MOST_THREADS[WARP_SIZE])
    block = min(triton.next_power_of_2(n), THREAD_TOKENS * threads)
    # Fusion is Triton's default; 3.9 warns that it will not stay so.
    return {"BLOCK": block, "num_warps": threads // WARP_SIZE, "enable_fp_fusion": True}


@triton.jit
def _forward_kernel(
    scores,
    out,
    stats,
    rows,
    tau,
    SCORES_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    N: tl.constexpr,
    KIND: tl.constexpr,
    SUMS: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a row may start beyond 2^31 elements
    scores += row * SCORES_STRIDE
    if SUMS:
        total, maximum = _stats_of_row(scores, N, KIND, BLOCK)
        tl.store(stats + row, total)
        if KIND == "softmax":
            tl.store(stats + rows + row, maximum)
    else:
        total, maximum = _load_stats(stats, row, rows, KIND)
    if WRITES:
        out += row * OUT_STRIDE
        scale = _scale(total, tau, KIND)
        for start in range(0, N, BLOCK):
            at = start + tl.arange(0, BLOCK)
            a = _load_scores(scores, at, N, KIND)
            if KIND == "l2_norm_gelu":
                s = _gelu(a * scale)
            else:
                s = _numerators(a, maximum, KIND) * scale
            tl.store(out + at, s.to(out.dtype.element_ty), mask=at < N)


@triton.jit
def _backward_kernel(
    scores,
    grad,
    out,
    stats,
    totals,
    rows,
    tau,
    SCORES_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    N: tl.constexpr,
    KIND: tl.constexpr,
    SUMS: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scores += row * SCORES_STRIDE
    grad += row * GRAD_STRIDE
    total, maximum = _load_stats(stats, row, rows, KIND)
    scale = _scale(total, tau, KIND)
    if SUMS:
        lanes = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, N, BLOCK):
            at = start + tl.arange(0, BLOCK)
            a = _load_scores(scores, at, N, KIND)
            g = tl.load(grad + at, mask=at < N, other=0.0).to(tl.float32)
            if KIND == "l2_norm_gelu":
                lanes += g * _gelu_derivative(a * scale) * a
            else:
                lanes += g * _numerators(a, maximum, KIND)
        row_sum = tl.sum(lanes, axis=0)
        tl.store(totals + row, row_sum)
    else:
        row_sum = tl.load(totals + row)
    if WRITES:
        out += row * OUT_STRIDE
        share = tl.where(total == 0.0, 0.0, row_sum / tl.where(total == 0.0, 1.0, total))
        for start in range(0, N, BLOCK):
            at = start + tl.arange(0, BLOCK)
            a = _load_scores(scores, at, N, KIND)
            g = tl.load(grad + at, mask=at < N, other=0.0).to(tl.float32)
            if KIND == "l2_norm_gelu":
                s = _gelu(a * scale)
                g = (g * _gelu_derivative(a * scale) - a * share) * scale
            else:
                numerator = _numerators(a, maximum, KIND)
                s = numerator * scale
                if KIND == "gelu_l2_norm":
                    g = (g - numerator * share) * scale * _gelu_derivative(a)
                else:
                    g = (g - share) * s
            tl.store(out + at, s.to(out.dtype.element_ty), mask=at < N)
            tl.store(grad + at, g.to(grad.dtype.element_ty), mask=at < N)


@triton.jit
def _stats_of_row(scores, N: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """T and the maximum of one row, read once: what was summed is rescaled when the maximum rises."""
    maximum = float("-inf")
    lanes = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a = _load_scores(scores, at, N, KIND)
        if KIND == "softmax":
            higher = tl.maximum(maximum, tl.max(a, axis=0))
            lanes = lanes * tl.exp(maximum - higher) + tl.exp(a - higher)
            maximum = higher
        else:
            numerator = _numerators(a, 0.0, KIND)
            lanes += numerator * numerator
    return tl.sum(lanes, axis=0), maximum


@triton.jit
def _load_stats(stats, row, rows, KIND: tl.constexpr):
    maximum = 0.0
    if KIND == "softmax":
        maximum = tl.load(stats + rows + row)
    return tl.load(stats + row), maximum


@triton.jit
def _load_scores(scores, at, N: tl.constexpr, KIND: tl.constexpr):
    """A where there are tokens, and where there are none what adds nothing to a sum of numerators."""
    if KIND == "softmax":
        return tl.load(scores + at, mask=at < N, other=float("-inf")).to(tl.float32)
    else:
        return tl.load(scores + at, mask=at < N, other=0.0).to(tl.float32)


@triton.jit
def _numerators(a, maximum, KIND: tl.constexpr):
    if KIND == "softmax":
        return tl.exp(a - maximum)
    elif KIND == "gelu_l2_norm":
        return _gelu(a)
    else:
        return a


@triton.jit
def _scale(total, tau, KIND: tl.constexpr):
    some = tl.where(total == 0.0, 1.0, total)
    if KIND == "softmax":
        scale = tau * tau / some
    else:
        scale = tau / tl.sqrt_rn(some)
    return tl.where(total == 0.0, 0.0, scale)


@triton.jit
def _gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_derivative(z):
    density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
