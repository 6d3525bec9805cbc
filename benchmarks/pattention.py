"""Pattention forward and backward: ours, the formula under autograd, the published steps, the products alone.

"Keys joined" is what ours could be: one product of X with the keys of q, k and v, which are joined each time,
one for their gradients, and one for X's.  For the FFN it is ours.

All do the same work in rounds that take turns, so that a busy machine is busy for all; what counts is the
median over the rounds of the ratio to the products alone, the least that any implementation can take.
On a CPU, CPU time of the process is measured, which other processes on the machine disturb least.

    python benchmarks/pattention.py --sizes 576 9216 --rounds 9
    python benchmarks/pattention.py --device cuda --dtype bf16 --tokens 16384 --threads 8     # on a GPU
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from ladder import TOKENS
from reporting import add_device_option, add_json_option, at_least_one, describe, report, settings
from torch import Tensor

from megatron_tokenformer.config.schema import ScoreNorm
from megatron_tokenformer.errors import run_cli
from megatron_tokenformer.kernels import reference, score_norm
from megatron_tokenformer.model.pattend import pattend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Pass = Callable[["Work"], object]


@dataclass(frozen=True)
class Work:
    """One or three Pattentions of one input."""

    x: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    grads: list[Tensor]
    kind: ScoreNorm

    @property
    def taus(self) -> list[float]:
        """sqrt(n) of each."""
        return [math.sqrt(len(k)) for k in self.keys]

    def backward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of x, keys and values."""
        return torch.autograd.grad(outputs, [self.x, *self.keys, *self.values], self.grads)


def ours(work: Work) -> object:
    """As the model computes it, keeping the scores."""
    return work.backward(pattend(work.x, work.keys, work.values, work.taus, work.kind))


def recomputed(work: Work) -> object:
    """As the model computes it with training.recompute=scores."""
    return work.backward(pattend(work.x, work.keys, work.values, work.taus, work.kind, recompute_scores=True))


@torch.no_grad()
def joined(work: Work) -> object:
    """Ours with the keys of all projections in one product forward and two backward; values apart."""
    sizes = [len(k) for k in work.keys]
    keys = torch.cat(work.keys) if len(sizes) > 1 else work.keys[0]
    scores = (work.x @ keys.t()).split(sizes, dim=1)
    stats = []
    for a, v, tau in zip(scores, work.values, work.taus):
        weights, own = score_norm.weights(a, tau, work.kind)
        stats.append(own)
        weights @ v
    grads = work.x.new_empty(len(work.x), len(keys))
    for g, dy, v in zip(grads.split(sizes, dim=1), work.grads, work.values):
        torch.mm(dy, v.t(), out=g)
    value_grads = [
        score_norm.gradients_(a, g, tau, work.kind, own).t() @ dy
        for a, g, tau, own, dy in zip(scores, grads.split(sizes, dim=1), work.taus, stats, work.grads)
    ]
    return grads @ keys, *(grads.t() @ work.x).split(sizes), *value_grads


def plain(work: Work) -> object:
    """The project's reference in torch, through autograd."""
    return work.backward(
        [
            reference.normalised_scores(work.x @ k.t(), tau, work.kind) @ v
            for k, v, tau in zip(work.keys, work.values, work.taus)
        ]
    )


def published(work: Work) -> object:
    """The paper's equations, a step at a time, through autograd."""
    outputs = []
    for keys, values in zip(work.keys, work.values):
        scores = work.x @ keys.transpose(-2, -1)
        n = scores.shape[-1]
        if work.kind == "softmax":
            weights = F.softmax(scores, dim=-1) * n
        elif work.kind == "l2_norm_gelu":
            weights = F.gelu(scores / torch.norm(scores, p=2, dim=-1, keepdim=True) * math.sqrt(n))
        else:
            active = F.gelu(scores)
            weights = active / torch.norm(active, p=2, dim=-1, keepdim=True) * math.sqrt(n)
        outputs.append(weights @ values)
    return work.backward(outputs)


@torch.no_grad()
def products(work: Work) -> object:
    """The six matrix products of each, on numbers that are at hand."""
    results = []
    for k, v, dy in zip(work.keys, work.values, work.grads):
        scores = work.x @ k.t()
        results.append(scores @ v)
        dweights = dy @ v.t()
        results += [scores.t() @ dy, dweights.t() @ work.x, dweights @ k]
    return results


CONTENDERS: dict[str, Pass] = {
    "products alone": products,
    "ours": ours,
    "ours, scores recomputed": recomputed,
    "ours, keys joined": joined,
    "formula, autograd": plain,
    "published steps, autograd": published,
}


def make_work(n: int, projections: int, given: argparse.Namespace) -> Work:
    """Random numbers of the sizes that a trained model has them in."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, std: float) -> Tensor:
        drawn = torch.randn(rows, given.width, generator=generator) * std
        return drawn.to(given.device, DTYPES[given.dtype])

    return Work(
        draw(given.tokens, 1.0).requires_grad_(),
        [draw(n, 0.02).requires_grad_() for _ in range(projections)],
        [draw(n, 0.02).requires_grad_() for _ in range(projections)],
        [draw(given.tokens, 1.0) for _ in range(projections)],
        given.score_norm,
    )


def seconds(run: Pass, work: Work, repeats: int) -> float:
    """Of one run; on a GPU wall time, else CPU time."""
    cuda = work.x.is_cuda
    if cuda:
        torch.cuda.synchronize(work.x.device)
    clock = time.perf_counter if cuda else time.process_time
    began = clock()
    for _ in range(repeats):
        run(work)
    if cuda:
        torch.cuda.synchronize(work.x.device)
    return (clock() - began) / repeats


def measure(work: Work, rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Of each contender the median milliseconds, and median, lowest and highest ratio to the products.

    Also the ratio of the least times of both, which a machine busy with other things disturbs less.
    """
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    names = list(CONTENDERS)
    for round_ in range(rounds + 1):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            taken = seconds(CONTENDERS[name], work, repeats)
            if round_:  # the first takes memory, and compiles kernels
                times[name].append(taken)
    found = {}
    for name, own in times.items():
        ratios = [mine / floor for mine, floor in zip(own, times["products alone"])]
        found[name] = {
            "ms": 1e3 * statistics.median(own),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "least": min(own) / min(times["products alone"]),
        }
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = ["| | n | " + " | ".join(CONTENDERS) + " |", "|---|---" + "|---" * len(CONTENDERS) + "|"]
    for row in results:
        cells = [
            f"{own['ms']:,.1f} ms"
            if name == "products alone"
            else f"{own['ratio']:.2f} ({own['lowest']:.2f} to {own['highest']:.2f}), {own['least']:.2f}"
            for name, own in row["found"].items()
        ]
        lines.append(f"| {row['place']} | {row['n']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--sizes",
        type=at_least_one,
        nargs="+",
        default=TOKENS,
        metavar="S",
        help="tokens of q, k and v; FFN has 4 S",
    )
    add("--width", type=at_least_one, default=768, help="d (default: 768)")
    add(
        "--tokens",
        type=at_least_one,
        default=256,
        help="rows of the input (default: 256; on a GPU take 16384)",
    )
    add("--score-norm", choices=get_args(ScoreNorm), default="l2_norm_gelu")
    add("--dtype", choices=DTYPES, default="fp32")
    add_device_option(parser)
    add(
        "--threads",
        type=at_least_one,
        default=1,
        help="of torch on a CPU (default: 1, for a steady CPU time)",
    )
    add("--rounds", type=at_least_one, default=7)
    add("--repeats", type=at_least_one, default=1, help="runs of each contender in a round (default: 1)")
    add_json_option(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = []
    for size in given.sizes:
        for place, n, projections in (("q, k, v", size, 3), ("FFN", 4 * size, 1)):
            work = make_work(n, projections, given)
            results.append({"place": place, "n": n, "found": measure(work, given.rounds, given.repeats)})
    head = (
        f"{given.tokens:,} tokens of width {given.width}, {given.dtype}, {given.score_norm}, "
        f"{describe(given.device)['device']}\n"
        "median of the rounds' ratios to the products (lowest to highest), ratio of the least times\n"
    )
    report(head + table(results), {"settings": settings(given), "results": results}, given.json, given.device)
    return 0


if __name__ == "__main__":
    run_cli(main)
